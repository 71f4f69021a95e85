"""FedDEAP against loops: five terms, which tensors each trains, and tests without batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import shape_only_clip
from fedprompt.data.features.inputs import Inputs
from fedprompt.errors import UserError
from fedprompt.methods.base import ClientData, Tensors, uploaded_numbers
from fedprompt.methods.feddeap import frame
from tests.support import twins
from tests.support.builders import CLASS_NAMES
from tests.support.twins import B, K

OPTIONS = {
    "context_tokens": 2, "domains": 3, "hidden": 7, "class_weight": 0.6, "domain_weight": 0.8,
}  # fmt: skip
"""Of the tests' CLIP, text and features have different widths."""


def raw_classes(clip: FrozenCLIP, ours: Tensor, local: Tensor, mean: Tensor) -> Tensor:
    """Class features (C, D) of [G, L m] up to their lengths, which the networks' ReLU needs."""
    model = clip.model
    scaled = local * F.interpolate(mean[None, None], ours.shape[-1], mode="linear")[0, 0]
    rows = []
    for c, name in enumerate(CLASS_NAMES):
        context = torch.cat([ours[c], scaled[c]])
        ids = clip.tokenizer([f"{' '.join('X' * len(context))} {name}."])
        x = model.token_embedding(ids)
        x = torch.cat([x[:, :1], context[None], x[:, 1 + len(context) :]], dim=1)
        x = model.transformer(x + model.positional_embedding, attn_mask=model.attn_mask)
        rows.append(model.ln_final(x)[0, int(ids.argmax())] @ model.text_projection)
    return torch.stack(rows)


def network(tensors: Tensors, name: str, x: Tensor) -> Tensor:
    hidden = F.linear(x, tensors[f"{name}.linear1.weight"], tensors[f"{name}.linear1.bias"])
    out = F.relu(hidden)
    out = F.linear(out, tensors[f"{name}.linear2.weight"], tensors[f"{name}.linear2.bias"])
    return out / out.norm(dim=-1, keepdim=True)


def test_twin(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "feddeap", **OPTIONS)
    shared, private = twins.tensors(method)
    private["domain"] = torch.stack([method.init_private(1, k)["domain"] for k in range(K)])
    private["mean"] = private["mean"].detach()
    batch = twins.batch(clip)
    norms = 1 + twins.draw(K, B, seed=5).abs()
    batch = replace(batch, inputs=replace(batch.inputs, norms=norms))
    terms = twins.loss_of(method, shared, private, batch)
    leaves = {f"shared.{n}": t for n, t in shared.items()} | {"private.ctx": private["ctx"]}
    found = method.gradients(terms, leaves, batch)
    classes, domains = frame(32, 6, "classes"), frame(32, 3, "domains")
    for k in range(K):
        images, labels = twins.images_of(batch, k)
        raw = images * norms[k][batch.mask_KB[k]][:, None]
        own = {n: t[k].detach().requires_grad_() for n, t in shared.items()}
        fixed = {n: t.detach() for n, t in own.items()}
        local = private["ctx"][k].detach().requires_grad_()
        texts = raw_classes(clip, own["ctx"], local, raw.mean(0))
        logits = clip.logit_scale * images @ F.normalize(texts, dim=-1).T
        everything = torch.arange(6)
        expected = {
            "ce": F.cross_entropy(logits, labels),
            "semantic": F.cross_entropy(network(own, "semantic", raw) @ classes, labels),
            "domain": F.cross_entropy(
                network(own, "domains", raw) @ domains, torch.full_like(labels, k)
            ),
            "text_semantic": 0.6
            * F.cross_entropy(network(fixed, "semantic", texts) @ classes, everything),
            "text_domain": 0.8
            * F.cross_entropy(network(fixed, "domains", texts) @ domains, 0 * everything + k),
        }
        for name, value in expected.items():
            twins.close(terms[name][k], value, name)
        common = sum(v for n, v in expected.items() if n != "text_domain")
        kept = sum(v for n, v in expected.items() if n != "text_semantic")
        assert isinstance(common, Tensor)
        assert isinstance(kept, Tensor)
        theirs = torch.autograd.grad(common, list(own.values()), retain_graph=True)
        for name, plain in zip(own, theirs, strict=True):
            ours = found[f"shared.{name}"]
            assert ours is not None
            twins.close(ours[k], plain, name)
        ours = found["private.ctx"]
        assert ours is not None
        twins.close(ours[k], torch.autograd.grad(kept, local)[0], "local")


def test_a_prediction_depends_on_the_clients_mean_and_not_on_other_images(
    clip: FrozenCLIP,
) -> None:
    method = twins.build(clip, "feddeap", **OPTIONS)
    vectors, norms = twins.features(1, 4, clip.embed_dim)[0], torch.tensor([1.0, 2, 3, 4])
    data = ClientData(1, Inputs(vectors, norms=norms), torch.arange(4))
    private = method.init_private_from_data(method.init_private(1, 1), data, 1)
    torch.testing.assert_close(private["mean"], (vectors * norms[:, None]).mean(0))
    assert private["domain"].tolist() == [0, 1, 0]
    shared = {n: t[None] for n, t in method.init_shared(1).items()}
    encoded = method.encode(shared, {n: t[None] for n, t in private.items()})
    with torch.no_grad():
        texts = raw_classes(clip, shared["ctx"][0], private["ctx"], private["mean"])
    twins.close(encoded["classes"][0], F.normalize(texts, dim=-1), "classes")


@pytest.mark.parametrize("count", [2, 5])
def test_frames_are_simplices(count: int) -> None:
    columns = frame(8, count, "classes")
    expected = torch.full((count, count), -1 / (count - 1))
    expected.fill_diagonal_(1)
    torch.testing.assert_close(columns.T @ columns, expected, atol=1e-5, rtol=0)


def test_too_many_domains(clip: FrozenCLIP) -> None:
    with pytest.raises(UserError, match="33 domains"):
        twins.build(clip, "feddeap", domains=33)


def test_upload_on_vit_b16() -> None:
    method = twins.build(shape_only_clip("ViT-B-16"), "feddeap")
    layers = nn.Sequential(nn.Linear(512, 256), nn.Linear(256, 512))
    nets = sum(p.numel() for p in layers.parameters())
    assert uploaded_numbers(method) == 6 * 16 * 512 + 2 * nets
