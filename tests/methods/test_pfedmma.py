"""pFedMMA against torch modules, 77 positions and one client at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import shape_only_clip
from fedprompt.config.fields import build
from fedprompt.config.schema import TrainingConfig
from fedprompt.errors import UserError
from fedprompt.methods.base import ClientData, Method, Task, Tensors, stack, uploaded_numbers
from fedprompt.methods.registry import method_class
from fedprompt.training import train_clients
from tests.support import twins
from tests.support.builders import CLASS_NAMES, batch_of, random_clip

K, B = 2, 5
LABELS = torch.tensor([[0, 1, 2, 3, 3], [5, 4, 0, 0, 1]])
ALPHA = 0.5
"""Large enough for the adapters to matter; the default is 0.001."""


@pytest.fixture(scope="module")
def deep_clip() -> FrozenCLIP:
    return random_clip(vision_cfg={"layers": 4, "width": 96}, text_cfg={"layers": 5})


def make(clip: FrozenCLIP, **options: Any) -> Method:
    cls = method_class("pfedmma")
    config = build(cls.Config, {"name": "pfedmma", "rank": 6, **options}, "method")
    return cls(config, clip, Task(CLASS_NAMES))


class Adapter(nn.Module):
    """One tower's adapters of the top layers; `project` is shared by both towers."""

    def __init__(self, tower: str, tensors: Tensors, shared: list[nn.Linear]) -> None:
        super().__init__()
        self.down = _linears(tensors, f"{tower}.down.")
        self.up = _linears(tensors, f"{tower}.up.")
        self.shared = shared

    def forward(self, j: int, z: Tensor) -> Tensor:
        hidden = torch.relu(self.shared[j](torch.relu(self.down[j](z))))
        out: Tensor = self.up[j](hidden)
        return out


def _linears(tensors: Tensors, name: str) -> nn.ModuleList:
    layers = nn.ModuleList()
    for weight, bias in zip(tensors[f"{name}weight"], tensors[f"{name}bias"], strict=True):
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers.append(layer)
    return layers


def twin_logits(
    clip: FrozenCLIP, adapters: dict[str, Adapter], layers: int, pixels: Tensor
) -> Tensor:
    """Logits (B, C): every position through every block, the adapter beside it."""
    model, visual = clip.model, clip.model.visual

    def through(blocks: Any, adapter: Adapter, x: Tensor, **mask: Any) -> Tensor:
        for i, block in enumerate(blocks):
            j = i - (len(blocks) - layers)
            beside = ALPHA * adapter(j, block.ln_1(x)) if j >= 0 else 0
            x = block(x, **mask) + beside
        return x

    ids = clip.tokenizer([f"a photo of a {c}." for c in CLASS_NAMES])
    x = model.token_embedding(ids) + model.positional_embedding
    x = through(model.transformer.resblocks, adapters["text"], x, attn_mask=model.attn_mask)
    x = model.ln_final(x)[torch.arange(len(ids)), ids.argmax(-1)]
    text = F.normalize(x @ model.text_projection, dim=-1)
    x = through(visual.transformer.resblocks, adapters["visual"], visual._embeds(pixels))
    images = F.normalize(visual.ln_post(x[:, 0]) @ visual.proj, dim=-1)
    return model.logit_scale.exp() * images @ text.T


@pytest.mark.parametrize("layers", [1, 3, 8])
@pytest.mark.parametrize("gradient_scale", ["mma", "exact"])
def test_logits_loss_and_gradients_are_the_plain_ones(
    deep_clip: FrozenCLIP, gradient_scale: str, layers: int
) -> None:
    method = make(deep_clip, layers=layers, scale=ALPHA, gradient_scale=gradient_scale)
    depth = min(layers, 4)
    shared, private = (
        twins.moved(method.init_shared(1), K, 1),
        twins.moved(method.init_private(1, 0), K, 2),
    )
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    batch = batch_of(twins.pictures(deep_clip, K, B), LABELS, mask)
    encoded = method.encode(shared, private)
    logits = method.logits(encoded, batch.inputs)
    ce = method.loss_terms(shared, private, encoded, batch)["ce"]
    named = shared | private
    ours = dict(zip(named, torch.autograd.grad(ce.sum(), list(named.values())), strict=True))
    # 1/alpha times the adapters' true gradients; nothing else in the graph is trained.
    factor = 1 / ALPHA if gradient_scale == "mma" else 1.0
    for k in range(K):
        own = {n: t.detach()[k] for n, t in named.items()}
        both = _linears(own, "")
        adapters = {t: Adapter(t, own, list(both)) for t in ("text", "visual")}
        assert batch.inputs.pixels is not None
        expected = twin_logits(deep_clip, adapters, depth, batch.inputs.pixels[k])
        twins.close(logits[k], expected)
        real = int(mask[k].sum())
        loss = F.cross_entropy(expected[:real], LABELS[k, :real])
        assert ce[k].item() == pytest.approx(loss.item(), rel=1e-4)
        loss.backward()
        modules = {"": both}
        for tower, adapter in adapters.items():
            modules |= {f"{tower}.down.": adapter.down, f"{tower}.up.": adapter.up}
        for name, linears in modules.items():
            for part in ("weight", "bias"):
                theirs = torch.stack([getattr(layer, part).grad for layer in linears])
                twins.close(ours[f"{name}{part}"][k], factor * theirs)


def test_the_scaled_gradient_leaves_lower_layers_their_true_one(deep_clip: FrozenCLIP) -> None:
    """By hand, without towers: y = alpha w x has gradient x for w and alpha w for x."""
    from fedprompt.methods.pfedmma import _scaled_gradient

    x, w = torch.tensor(3.0, requires_grad=True), torch.tensor(5.0, requires_grad=True)
    y = _scaled_gradient(ALPHA * w * _scaled_gradient(x, ALPHA), 1 / ALPHA)
    assert y.item() == 7.5
    y.backward()
    assert w.grad is not None
    assert x.grad is not None
    assert (w.grad.item(), x.grad.item()) == (3.0, 2.5)


def test_starts_are_the_authors(deep_clip: FrozenCLIP) -> None:
    method = make(deep_clip, rank=32)
    shared, private = method.init_shared(1), method.init_private(1, 0)
    assert {n: t.shape for n, t in (shared | private).items()} == {
        "weight": (4, 32, 32),
        "bias": (4, 32),
        "text.down.weight": (4, 32, 64),
        "text.down.bias": (4, 32),
        "text.up.weight": (4, 64, 32),
        "text.up.bias": (4, 64),
        "visual.down.weight": (4, 32, 96),
        "visual.down.bias": (4, 32),
        "visual.up.weight": (4, 96, 32),
        "visual.up.bias": (4, 96),
    }
    for name, tensor in (shared | private).items():
        if name.endswith("bias"):
            assert not tensor.any()
        else:  # kaiming_normal_ with fan_out
            std = math.sqrt(2 / tensor.shape[1])
            assert tensor.std().item() == pytest.approx(std, rel=0.05)
    other = method.init_private(1, 7)
    assert all(torch.equal(other[n], t) for n, t in private.items())
    assert not torch.equal(shared["weight"][0], shared["weight"][1])


def test_only_the_shared_projection_is_uploaded_and_there_is_no_global_model(
    deep_clip: FrozenCLIP,
) -> None:
    method = make(deep_clip)
    assert not method.has_global
    assert uploaded_numbers(method) == 4 * (6 * 6 + 6)
    assert uploaded_numbers(make(shape_only_clip("ViT-B-16"), rank=32)) == 8_448


def test_up_and_down_projections_become_the_clients_own(deep_clip: FrozenCLIP) -> None:
    method = make(deep_clip, scale=0.05)
    inputs = twins.pictures(deep_clip, K, B)
    start = [method.init_private(1, k) for k in range(K)]
    results = train_clients(
        method,
        [method.init_shared(1)] * K,
        start,
        [ClientData(k, inputs[k], LABELS[k]) for k in range(K)],
        TrainingConfig(lr=0.01, batch_size=5),
        seed=1,
        server_round=1,
        rounds=1,
    )
    for name in ("text.down.weight", "visual.up.weight", "visual.down.bias"):
        first, second = (r.private[name] for r in results)
        assert not torch.allclose(first, second)
        assert not torch.allclose(first, start[0][name])
    assert set(results[0].shared) == {"weight", "bias"}


def test_one_client_alone_is_one_of_several(deep_clip: FrozenCLIP) -> None:
    """In evaluation the shared tensors have a client axis of 1."""
    method, inputs = make(deep_clip, scale=ALPHA), twins.pictures(deep_clip, K, B)
    shared = {n: t[None] for n, t in method.init_shared(1).items()}
    private = twins.moved(method.init_private(1, 0), K, 2)
    together = method.logits(method.encode(shared, private), inputs)
    for k in range(K):
        own = stack([{n: t.detach()[k] for n, t in private.items()}])
        alone = method.logits(method.encode(shared, own), inputs[k : k + 1])
        twins.close(together[k], alone[0], rtol=1e-5)
    everyone = method.logits(method.encode(shared, private), inputs[:1])
    twins.close(everyone[0], together[0], rtol=1e-5)
    assert everyone.shape == (K, B, len(CLASS_NAMES))


def test_wrong_settings_are_one_line(deep_clip: FrozenCLIP) -> None:
    with pytest.raises(UserError, match=r"scale is 0\.0; it must be greater than 0"):
        make(deep_clip, scale=0.0)
    with pytest.raises(UserError, match="gradient_scale is 'none'; it must be one of mma, exact"):
        make(deep_clip, gradient_scale="none")
