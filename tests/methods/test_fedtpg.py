"""FedTPG: the generator against torch's own modules, and what it depends on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import shape_only_clip
from fedprompt.errors import UserError
from fedprompt.methods.base import Task, Tensors, uploaded_numbers
from tests.support import twins
from tests.support.builders import CLASS_NAMES, random_clip
from tests.support.twins import K


class Twin(nn.Module):
    """Pre-norm cross-attention without residual, then a GEGLU layer with one."""

    def __init__(self, own: Tensors, heads: int) -> None:
        super().__init__()
        (tokens, d), names = own["queries"].shape, own["k.weight"].shape[1]
        self.queries = nn.Parameter(torch.empty(tokens, d))
        self.norm_queries, self.norm_names = nn.LayerNorm(d), nn.LayerNorm(names)
        self.attention = nn.MultiheadAttention(d, heads, kdim=names, vdim=names, batch_first=True)
        self.norm_up = nn.LayerNorm(d)
        self.up, self.down = nn.Linear(d, 8 * d), nn.Linear(4 * d, d)
        self.fill(own)

    def fill(self, own: Tensors) -> None:
        given = {n: t for n, t in own.items() if n.split(".")[0] not in ("q", "k", "v", "out")}
        if self.attention.in_proj_weight is not None:
            weights = [own[f"{n}.weight"] for n in "qkv"]
            given["attention.in_proj_weight"] = torch.cat(weights)
        else:
            given |= {f"attention.{n}_proj_weight": own[f"{n}.weight"] for n in "qkv"}
        given["attention.in_proj_bias"] = torch.cat([own[f"{n}.bias"] for n in "qkv"])
        given["attention.out_proj.weight"] = own["out.weight"]
        given["attention.out_proj.bias"] = own["out.bias"]
        self.load_state_dict(given, strict=True)

    def forward(self, names: Tensor) -> Tensor:
        key = self.norm_names(names)[None]
        x, _ = self.attention(self.norm_queries(self.queries)[None], key, key)
        value, gate = self.up(self.norm_up(x)).chunk(2, dim=-1)
        return (x + self.down(value * F.gelu(gate)))[0]

    def gradients(self) -> Tensors:
        """Gradients by our names."""
        found = {n: p.grad for n, p in self.named_parameters() if "attention" not in n}
        attention = self.attention
        if attention.in_proj_weight is not None:
            weights = attention.in_proj_weight.grad.chunk(3)
            found |= dict(zip(("q.weight", "k.weight", "v.weight"), weights, strict=True))
        else:
            found |= {f"{n}.weight": getattr(attention, f"{n}_proj_weight").grad for n in "qkv"}
        biases = attention.in_proj_bias.grad.chunk(3)
        found |= dict(zip(("q.bias", "k.bias", "v.bias"), biases, strict=True))
        return found | {
            "out.weight": attention.out_proj.weight.grad,
            "out.bias": attention.out_proj.bias.grad,
        }


def name_features(clip: FrozenCLIP) -> Tensor:
    """Normalised features (C, D) of the bare class names."""
    model: Any = clip.model
    with torch.no_grad():
        return F.normalize(model.encode_text(clip.tokenizer(list(CLASS_NAMES))), dim=-1)


@pytest.mark.parametrize("embed_dim", [32, 64], ids=["embedding narrower than text", "as wide"])
def test_twin(embed_dim: int) -> None:
    clip = random_clip(embed_dim=embed_dim)
    method: Any = twins.build(clip, "fedtpg")
    shared, batch = twins.tensors(method, 0.1)[0], twins.batch(clip)
    encoded = method.encode(shared, {})
    logits, loss_terms = (
        method.logits(encoded, batch.inputs),
        method.loss_terms(shared, {}, encoded, batch),
    )
    ours, contexts = twins.applied_gradients(method, shared, batch), method.context(shared)
    assert ours.keys() == shared.keys()
    for k in range(K):
        twin = Twin({n: t[k].detach() for n, t in shared.items()}, heads=4)
        context = twin(name_features(clip))
        twins.close(contexts[k], context, "context")
        images, labels = twins.images_of(batch, k)
        expected = clip.model.logit_scale.exp() * images @ twins.class_features(clip, context).T
        twins.close(logits[k][batch.mask_KB[k]], expected, "logits")
        loss = F.cross_entropy(expected, labels)
        twins.close(loss_terms["ce"][k], loss, "loss")
        clip.model.requires_grad_(False)
        loss.backward()
        for name, theirs in twin.gradients().items():
            if name == "k.bias":  # the same for all keys: the softmax does not see it
                assert ours[name][k].abs().max() < 1e-5 * ours["v.bias"][k].abs().max()
            else:
                twins.close(ours[name][k], theirs, name)


def test_numbers_on_vit_b16() -> None:
    """The public generator's own count; FedMGP's 4,208.1 thousand is 4 x 512 more."""
    method = twins.build(shape_only_clip("ViT-B-16"), "fedtpg")
    assert uploaded_numbers(method) == 4_206_080
    assert round((4_206_080 + 4 * 512) / 1000, 1) == 4208.1
    assert dict(method.config.default_strategy) == {"name": "fedavg", "weights": "uniform"}


def test_the_context_follows_the_class_names(clip: FrozenCLIP) -> None:
    """Other names, another context; another order of the names, the same one."""

    def context(*names: str) -> Tensor:
        method: Any = twins.build(clip, "fedtpg", Task(names))
        return method.context({n: t[None] for n, t in method.init_shared(1).items()})

    first = context(*CLASS_NAMES)
    twins.close(context(*reversed(CLASS_NAMES)), first)
    assert (context("airport", "bridge", "forest") - first).abs().max() > 1e-3 * first.abs().max()


def test_names_are_read_without_underscores(clip: FrozenCLIP) -> None:
    spaced: Any = twins.build(clip, "fedtpg", Task(("dense residential", "beach")))
    scored: Any = twins.build(clip, "fedtpg", Task(("dense_residential", "beach")))
    assert torch.equal(spaced.names_CD, scored.names_CD)


def test_it_starts_as_torch_does(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "fedtpg")
    start, d = method.init_shared(1), clip.text.width
    assert start["queries"].std() == pytest.approx(0.02, rel=0.2)
    for name in ("q.bias", "k.bias", "v.bias", "out.bias", "norm_up.bias"):
        assert not start[name].any()
    assert float(start["up.weight"].abs().max()) == pytest.approx(d**-0.5, rel=0.01)
    assert not torch.equal(start["q.weight"], method.init_shared(2)["q.weight"])


@pytest.mark.parametrize("embed_dim", [32, 64])
def test_the_attention_starts_as_torch_does(embed_dim: int) -> None:
    """Joint features as wide as the text tower, and not."""
    clip = random_clip(embed_dim=embed_dim)
    start = twins.build(clip, "fedtpg").init_shared(1)
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(64, 4, kdim=embed_dim, vdim=embed_dim)
    separate = [theirs.q_proj_weight, theirs.k_proj_weight, theirs.v_proj_weight]
    parts = separate if theirs.in_proj_weight is None else theirs.in_proj_weight.chunk(3)
    for name, part in zip("qkv", parts, strict=True):
        ours = start[f"{name}.weight"]
        assert ours.shape == part.shape
        assert ours.abs().max().item() == pytest.approx(part.abs().max().item(), rel=0.02)


def test_heads_must_divide_the_width(clip: FrozenCLIP) -> None:
    with pytest.raises(UserError, match="heads is 5"):
        twins.build(clip, "fedtpg", heads=5)
