from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import shape_only_clip
from fedprompt.errors import UserError
from fedprompt.methods.base import Batch, Tensors, stack, uploaded_numbers
from tests.support import twins
from tests.support.builders import batch_of
from tests.support.twins import SIZES, K

OPTIONS: dict[str, Any] = {
    "context_tokens": 3,
    "experts": 4,
    "gate_width": 16,
    "gate_heads": 4,
    "scaling": 3.0,
    "lam": 0.7,
}
KNOWN = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, 1.0]])
N = len(SIZES)


def states(method: Any) -> tuple[Tensors, Tensors]:
    """K clients in their second round, with two or three peers; other rows hold no prompt."""
    noise = torch.Generator().manual_seed(11)

    def random(*shape: int, scale: float = 0.3) -> Tensor:
        return scale * torch.randn(*shape, generator=noise)

    width = method.clip.text.width
    shared = {
        "ctx": random(K, 3, width).requires_grad_(),
        "peers.ctx": random(K, 3, 3, width),
        "peers.known": KNOWN.clone(),
    }
    private = stack([method.init_private(1, k) for k in range(K)])
    for name, value in private.items():
        if name.startswith("gate."):
            private[name] = (value + random(*value.shape)).requires_grad_()
    private |= {"visits": torch.full((K, 1), 2.0), "own.ctx": random(K, 3, width)}
    return shared, private


def twin_logits(method: Any, shared: Tensors, private: Tensors, features: Tensor, k: int) -> Tensor:
    """The gate as torch's own attention module; one class and one client at a time."""
    clip, width, heads = method.clip, OPTIONS["gate_width"], OPTIONS["gate_heads"]
    stride = clip.embed_dim // width
    own = twins.class_features(clip, shared["ctx"][k])
    with torch.no_grad():
        others = [twins.class_features(clip, prompt) for prompt in shared["peers.ctx"][k]]
    gate = {
        n: private[f"gate.{n}"][k] for part in "qkvo" for n in (f"{part}.weight", f"{part}.bias")
    }
    # torch divides scores by sqrt(width / heads); the method multiplies by `scaling` instead.
    factor = OPTIONS["scaling"] * (width / heads) ** 0.5
    logits = []
    for c in range(len(own)):
        keys = torch.stack([t[c][::stride] for t in (own, *others)])[:, None]
        mixed, _ = F.multi_head_attention_forward(
            features[:, None, ::stride],
            keys,
            keys,
            width,
            heads,
            torch.cat([factor * gate["q.weight"], gate["k.weight"], gate["v.weight"]]),
            torch.cat([factor * gate["q.bias"], gate["k.bias"], gate["v.bias"]]),
            None,
            None,
            False,
            0.0,
            gate["o.weight"],
            gate["o.bias"],
            key_padding_mask=torch.cat([torch.tensor([False]), KNOWN[k] == 0])[None],
            need_weights=False,
        )
        mixture = (features[:, ::stride] * mixed[:, 0]).sum(-1)
        logits.append(clip.logit_scale * (OPTIONS["lam"] * features @ own[c] + mixture))
    return torch.stack(logits, dim=-1)


def test_logits_loss_and_gradients_are_those_of_torch_s_attention(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "pfedmoap", **OPTIONS)
    shared, private = states(method)
    data = twins.batch(clip)
    encoded = method.encode(shared, private)
    logits = method.logits(encoded, data.inputs)
    leaves = {"shared.ctx": shared["ctx"]}
    leaves |= {f"private.{n}": t for n, t in private.items() if t.requires_grad}
    ours = method.gradients(method.loss_terms(shared, private, encoded, data), leaves, data)
    losses = []
    for k in range(K):
        expected = twin_logits(method, shared, private, data.inputs.features[k], k)
        twins.close(logits[k], expected, f"client {k}")
        features, labels = twins.images_of(data, k)
        losses.append(F.cross_entropy(twin_logits(method, shared, private, features, k), labels))
    loss_terms = method.loss_terms(shared, private, encoded, data)
    twins.close(loss_terms["ce"], torch.stack(losses))
    theirs = torch.autograd.grad(sum(losses), list(leaves.values()))  # type: ignore[arg-type]
    for (name, found), other in zip(ours.items(), theirs, strict=True):
        assert found is not None
        if "bias" in name and "q." not in name:
            # k's adds the same to all scores, v's and o's the same to the logits of all classes.
            assert max(float(found.abs().max()), float(other.abs().max())) < 1e-5
        else:
            twins.close(found, other, name)


def test_unknown_rows_change_nothing(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "pfedmoap", **OPTIONS)
    shared, private = states(method)
    data = twins.batch(clip)
    before = method.logits(method.encode(shared, private), data.inputs)
    shared["peers.ctx"][0, 2] *= -1
    after = method.logits(method.encode(shared, private), data.inputs)
    torch.testing.assert_close(before[0], after[0])
    shared["peers.ctx"][1, 2] *= -1
    changed = method.logits(method.encode(shared, private), data.inputs)
    assert not torch.allclose(before[1], changed[1], atol=1e-3)


def test_the_gate_joins_in_at_the_second_visit_and_only_with_peers(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "pfedmoap", **OPTIONS)
    shared, private = states(method)
    data = twins.batch(clip)
    gated = method.logits(method.encode(shared, private), data.inputs)
    private["visits"] = torch.tensor([[1.0], [2.0], [2.0]])
    mixed = method.logits(method.encode(shared, private), data.inputs)
    own = (
        clip.logit_scale * data.inputs.features[0] @ twins.class_features(clip, shared["ctx"][0]).T
    )
    twins.close(mixed[0], own)
    torch.testing.assert_close(mixed[1], gated[1])
    private["visits"][:] = 2
    shared["peers.known"] = torch.zeros_like(KNOWN)
    alone = method.encode(shared, private)
    twins.close(method.logits(alone, data.inputs)[0], own)
    assert method.class_embeddings(alone) is not None


def test_visits_by_hand(clip: FrozenCLIP) -> None:
    """First visit: CoOp, gate untouched. Later: the gate is trained; the own prompt predicts."""
    method = twins.build(clip, "pfedmoap", **OPTIONS)
    training, data = twins.config(), twins.clients(clip)
    received = method.init_shared(1) | method.init_extras(1)
    start = [method.init_private(1, k) for k in range(N)]
    first = twins.train(method, [received] * N, start, data, training, 1)
    for one, before, result in zip(data, start, first, strict=True):
        expected = twins.local_sgd(
            one, training, 1, received["ctx"], lambda p, x, y: twins.ce_gradient(clip, p, x, y)
        )
        twins.near(result.shared["ctx"], expected, received["ctx"])
        assert set(result.shared) == {"ctx"}
        assert torch.equal(result.private["own.ctx"], result.shared["ctx"])
        assert all(torch.equal(result.private[n], before[n]) for n in before if "gate" in n)
    peers = torch.stack([r.shared["ctx"] for r in first])
    received = method.init_shared(2) | {"peers.ctx": peers, "peers.known": torch.ones(3)}
    second = twins.train(method, [received] * N, [r.private for r in first], data, training, 2)
    for before, result in zip(first, second, strict=True):
        for n in ("gate.q.weight", "gate.v.bias", "gate.o.weight"):
            assert not torch.equal(result.private[n], before.private[n])
        assert result.private["visits"].item() == 2
        assert float((result.shared["ctx"] - received["ctx"]).abs().max()) > 1e-2
    shared = stack([received])
    private = stack([r.private for r in second[:K]])
    images = twins.batch(clip).inputs
    encoded = method.encode(shared, private)
    assert method.class_embeddings(encoded) is None
    for k in range(K):
        twins.close(encoded["classes"][k], twins.class_features(clip, second[k].shared["ctx"]))
    trained = {**shared, "ctx": torch.stack([r.shared["ctx"] for r in second[:K]])}
    private["own.valid"] = torch.zeros(K, 1)
    twins.close(
        method.logits(encoded, images), method.logits(method.encode(trained, private), images)
    )
    general = method.encode({"ctx": shared["ctx"]}, None)
    twins.close(general["classes"][0], twins.class_features(clip, received["ctx"]))


@pytest.mark.parametrize("wrapper", [None, "ditto", "fedper", "fedprox"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_gate_at_rest_stays_beside_one_that_trains(
    clip: FrozenCLIP, wrapper: str | None, optimizer: str
) -> None:
    """Clients 0 and 2 train their gates; client 1 is new, and client 0 later finds no peer."""
    if wrapper is None:
        method = twins.build(clip, "pfedmoap", **OPTIONS)
    else:
        mine = {"private_tokens": 1, "token_tensors": ["ctx"]} if wrapper == "fedper" else {}
        method = twins.build(clip, wrapper, base="pfedmoap", options=OPTIONS, **mine)
    training = twins.config(weight_decay=0.5, optimizer=optimizer)
    data = twins.clients(clip)
    received = method.init_shared(1) | method.init_extras(1)
    start = [method.init_private(1, k) for k in range(N)]
    first = twins.train(method, [received] * N, start, data, training, 1)
    ctx = received["ctx"]
    peers = torch.stack([torch.cat([ctx, ctx[:1]])[:3] + 0.1 * k for k in range(3)])
    known = received | {"peers.ctx": peers, "peers.known": torch.ones(3)}
    private = [first[0].private, start[1], first[2].private]

    def gates(held: Tensors) -> Tensors:
        found = {n: t for n, t in held.items() if "gate." in n}
        assert len(found) == (16 if wrapper == "ditto" else 8)
        return found

    def moved(k: int, sent: list[Tensors]) -> set[bool]:
        result = twins.train(method, sent, private, data, training, 2)[k]
        held = gates(private[k])
        return {not torch.equal(t, held[n]) for n, t in gates(result.private).items()}

    assert moved(0, [known] * N) == moved(2, [known] * N) == {True}
    assert moved(1, [known] * N) == {False}
    assert moved(0, [received, known, known]) == {False}


def test_experts_are_encoded_once_for_the_same_peers_and_again_for_others(
    clip: FrozenCLIP,
) -> None:
    method = twins.build(clip, "pfedmoap", **OPTIONS)
    shared, private = states(method)
    one = method.encode(shared, private)["experts"]
    before = clip.positions_encoded
    method.encode(shared, private)
    assert clip.positions_encoded - before == K * method.prompts.tower.positions
    shared["peers.ctx"][0, 0, 0, 0] += 1  # in place: the same tensor, other peers
    other = method.encode(shared, private)["experts"]
    assert not torch.equal(one[0, :, 1], other[0, :, 1])
    assert torch.equal(one[1], other[1])


def test_dropout_is_keyed_by_client_and_step_and_keeps_the_mean(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "pfedmoap", **OPTIONS, dropout=0.4)
    shared, private = states(method)

    def loss(step: int, wide: int = 5) -> Tensor:
        data = twins.batch(clip)
        inputs, labels = data.inputs[:, :wide], data.labels_KB[:, :wide]
        at: Batch = batch_of(inputs, labels, data.mask_KB[:, :wide], step=step)
        return method.loss_terms(shared, private, method.encode(shared, private), at)["ce"]

    assert torch.equal(loss(0), loss(0))
    assert not torch.allclose(loss(0), loss(1))
    torch.testing.assert_close(loss(0)[1], loss(0, wide=3)[1])
    encoded = method.encode(shared, private)
    data = twins.batch(clip)
    keep = (data.uniform((5, 6, 4, 4), "gate dropout") >= 0.4) / 0.6
    logits = method._logits(encoded, data.inputs, keep)
    for k in range(K):
        real = data.mask_KB[k]
        torch.testing.assert_close(
            loss(0)[k], F.cross_entropy(logits[k][real], data.labels_KB[k][real])
        )
    features = data.inputs.features
    plain = method._mixture(encoded, features, None)
    shape = (*features.shape[:2], 6, 4, 4)
    noise = torch.Generator().manual_seed(0)
    draws = torch.stack(
        [
            method._mixture(encoded, features, (torch.rand(shape, generator=noise) >= 0.4) / 0.6)
            for _ in range(4000)
        ]
    )
    error = (draws.mean(0) - plain).abs() / (draws.std(0) / 4000**0.5)
    assert float(error.detach().max()) < 5


def test_sizes_of_the_paper() -> None:
    method = twins.build(shape_only_clip("ViT-B-16"), "pfedmoap")
    assert uploaded_numbers(method) == 16 * 512
    assert tuple(method.init_extras(1)["peers.ctx"].shape) == (9, 16, 512)
    gate = {n: t for n, t in method.init_private(1, 0).items() if n.startswith("gate.")}
    assert sum(t.numel() for t in gate.values()) == 4 * (128 * 128 + 128)
    assert method.lr_scale["private.gate.o.weight"] == 5


@pytest.mark.parametrize("options", [{"gate_width": 12}, {"gate_heads": 5}, {"experts": 1}])
def test_gates_that_do_not_fit_are_refused(clip: FrozenCLIP, options: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        twins.build(clip, "pfedmoap", **options)
