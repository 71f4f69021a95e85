"""MoCoOp: twin of mixture, text loss and gate loss; shares of experts; what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import shape_only_clip
from fedprompt.data.features.inputs import Inputs
from fedprompt.errors import UserError
from fedprompt.messages import Update
from fedprompt.methods.base import ClientData, Tensors, uploaded_numbers
from tests.support import twins
from tests.support.builders import CLASS_NAMES
from tests.support.strategies import strategy_of_clients
from tests.support.twins import K

TEMPLATES = ["a photo of a {}.", "a map of a {}.", "a plan of the {}", "a low image of a {}."]
OPTIONS: dict[str, Any] = {"templates": TEMPLATES, "groups": [1, 2, 1], "anchors": 4}


def targets(clip: FrozenCLIP) -> Tensor:
    each = [twins.template_features(clip, t) for t in TEMPLATES]
    return F.normalize(torch.stack([each[0], (each[1] + each[2]) / 2, each[3]]), dim=-1)


def raw_features(clip: FrozenCLIP, context: Tensor) -> Tensor:
    """Features of the class names before they are normalised: each has the tower's own length."""
    model: Any = clip.model
    rows = []
    for name in CLASS_NAMES:
        ids = clip.tokenizer([f"{' '.join(['X'] * len(context))} {name}."])
        x = model.token_embedding(ids)
        x = torch.cat([x[:, :1], context[None], x[:, 1 + len(context) :]], 1)
        x = model.transformer(x + model.positional_embedding, attn_mask=model.attn_mask)
        rows.append(model.ln_final(x)[0, int(ids.argmax())] @ model.text_projection)
    return torch.stack(rows)


def twin(clip: FrozenCLIP, own: Tensors, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Logits, CE, text loss and gate loss of one client, image by image."""
    fixed = targets(clip)
    experts = [
        torch.stack([(f + own["correction"]) / (f + own["correction"]).norm() for f in raw])
        for raw in (raw_features(clip, own[f"ctx.{e}"]) for e in range(3))
    ]
    rows, gates = [], []
    for v, y in zip(images, labels, strict=True):
        h = own["gate.weight"] @ v + own["gate.bias"]
        first, second = h.argsort(descending=True)[:2].tolist()
        a = torch.stack([h[first], h[second]]).softmax(0)
        rows.append(clip.logit_scale * (a[0] * experts[first] + a[1] * experts[second]) @ v)
        near = torch.stack([v @ fixed[e, y] for e in range(3)])
        for e in near.argsort(descending=True)[:2].tolist():
            near[e] = near[e] + 10
        gates.append(-(near.softmax(0) * h.log_softmax(0)).sum())
    text = [
        F.cross_entropy((experts[e][c] @ fixed[e].T)[None], torch.tensor([c]))
        for e in range(3)
        for c in range(len(CLASS_NAMES))
    ]
    logits = torch.stack(rows)
    ce = F.cross_entropy(logits, labels)
    return logits, ce, 5 * torch.stack(text).mean(), torch.stack(gates).mean()


@pytest.mark.parametrize("gate", ["private", "shared"])
def test_twin(clip: FrozenCLIP, gate: str) -> None:
    method = twins.build(clip, "mocoop", **OPTIONS, gate=gate)
    assert ("gate.weight" in method.init_shared(1)) == (gate == "shared")
    shared, private = twins.tensors(method, 0.1)
    batch = twins.batch(clip)
    encoded = method.encode(shared, private)
    logits, loss_terms = (
        method.logits(encoded, batch.inputs),
        method.loss_terms(shared, private, encoded, batch),
    )
    leaf_of = {n: t for n, t in (shared | private).items() if t.requires_grad}
    ours = torch.autograd.grad(sum(t.sum() for t in loss_terms.values()), list(leaf_of.values()))
    for k in range(K):
        own = {n: t[k].detach().requires_grad_() for n, t in leaf_of.items()}
        images, labels = twins.images_of(batch, k)
        expected = twin(clip, own, images, labels)
        twins.close(logits[k][batch.mask_KB[k]], expected[0], "logits")
        for term, value in zip(("ce", "text", "gate"), expected[1:], strict=True):
            twins.close(loss_terms[term][k], value, term)
        theirs = torch.autograd.grad(sum(expected[1:]), list(own.values()))
        for n, a, b in zip(own, ours, theirs, strict=True):
            twins.close(a[k], b, n)


def test_clients_do_not_touch_each_other(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "mocoop", **OPTIONS)
    twins.assert_clients_alone_agree(method, *twins.tensors(method), twins.batch(clip))


def test_experts_start_from_the_first_template_of_their_group(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "mocoop", **OPTIONS)
    shared = {n: t[None] for n, t in method.init_shared(1).items()}
    experts = method.encode(shared, None)["experts"][0]
    for e, template in enumerate((TEMPLATES[0], TEMPLATES[1], TEMPLATES[3])):
        twins.close(experts[e], twins.template_features(clip, template))


def test_a_client_uploads_how_much_its_gate_uses_each_expert(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "mocoop", **OPTIONS)
    images = twins.features(1, 3, clip.embed_dim)[0]
    data = ClientData(0, Inputs(images), torch.tensor([0, 1, 2]))
    private = method.init_private_from_data(method.init_private(1, 0), data, 1)
    assert private["filled"].tolist() == [1, 1, 1, 0]
    shared = {n: t[None] for n, t in method.init_shared(1).items()}
    both = shared, {n: t[None] for n, t in private.items()}
    sent, kept = method.end_round(*both, twins.batch(clip).round_info.first(1))
    weights = []
    for v in images:
        h = private["gate.weight"] @ v + private["gate.bias"]
        h[h.argmin()] = -torch.inf
        weights.append(h.softmax(0))
    twins.close(sent["expert_shares"][0], torch.stack(weights).mean(0))
    assert kept["anchors"].shape == (1, 4, clip.embed_dim)


def test_an_expert_is_averaged_by_its_use() -> None:
    """Client 0 uses expert 0 alone, client 1 both; nobody uses expert 2."""
    shapes = {"expert_shares": (3,), "ctx.0": (1,), "ctx.1": (1,), "ctx.2": (1,), "w": (1,)}
    strategy = strategy_of_clients(2, "per_expert", shapes=shapes)
    last = {n: np.full(s, 9.0, np.float32) for n, s in shapes.items()}

    def update(client: int, value: float, shares: list[float], images: int) -> Update:
        arrays = {n: np.full(s, value, np.float32) for n, s in shapes.items()}
        return Update(client, {**arrays, "expert_shares": np.float32(shares)}, images)

    updates = [update(0, 1.0, [1, 0, 0], 10), update(1, 3.0, [0.5, 0.5, 0], 20)]
    mean = strategy.aggregate(1, last, updates)
    assert {n: a.tolist() for n, a in mean.items()} == {
        "expert_shares": [0, 0, 0], "ctx.0": [2.0], "ctx.1": [3.0], "ctx.2": [9.0],
        "w": pytest.approx([7 / 3]),
    }  # fmt: skip
    with pytest.raises(UserError, match="expert_shares"):
        strategy_of_clients(2, "per_expert", shapes={"ctx": (1,)})
    with pytest.raises(UserError, match=r"ctx\.7"):
        strategy_of_clients(2, "per_expert", shapes={"expert_shares": (3,), "ctx.7": (1,)})


def test_upload_on_vit_b16() -> None:
    """30 tokens in six contexts, the correction, and six shares."""
    method = twins.build(shape_only_clip("ViT-B-16"), "mocoop")
    assert uploaded_numbers(method) == (5 + 4 + 5 + 5 + 6 + 5) * 512 + 512 + 6
    assert all(tower.fast for tower in method.towers.values())  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "options",
    [
        {"templates": ["a {} in a video game.", "a photo of a {}."], "groups": [1, 1]},
        {"templates": ["{}.", "a photo of a {}."], "groups": [1, 1]},
        {"templates": ["a photo.", "a photo of a {}."], "groups": [1, 1]},
        {"groups": [12]},
        {"groups": [6, 5]},
        {"groups": [12, 0]},
    ],
)
def test_bad_options(clip: FrozenCLIP, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        twins.build(clip, "mocoop", **options)
