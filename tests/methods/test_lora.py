"""LoRA against open_clip's own modules with merged weights, and what its four sharings send."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedprompt.backbone import lora_text
from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import shape_only_clip
from fedprompt.errors import UserError
from fedprompt.federation.registry import strategy_class
from fedprompt.messages import Update
from fedprompt.methods.base import Batch, Method, Task, Tensors, uploaded_numbers
from tests.support import twins
from tests.support.builders import CLASS_NAMES, random_clip, random_resnet_clip
from tests.support.twins import B, K

EVERY = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
SHARINGS = ["both", "ffa", "fedsa", "dual"]


@pytest.fixture(scope="module")
def deep_clip() -> FrozenCLIP:
    return random_clip(vision_cfg={"layers": 3}, text_cfg={"layers": 3})


def batch_for(method: Method, clip: FrozenCLIP) -> Batch:
    data = twins.batch(clip)
    if "pixels" not in method.needs:
        return data
    return replace(data, inputs=twins.pictures(clip, K, B))


class Merged(nn.Module):
    """CLIP whose weights may be replaced; texts and pixels -> logits."""

    def __init__(self, clip: FrozenCLIP) -> None:
        super().__init__()
        self.model, self.scale = clip.model, clip.logit_scale

    def forward(self, ids: Tensor, images: Tensor) -> Tensor:
        text = F.normalize(self.model.encode_text(ids), dim=-1)
        if images.ndim == 4:
            images = F.normalize(self.model.encode_image(images), dim=-1)
        return self.scale * images @ text.T


def merged_weights(method: Method, clip: FrozenCLIP, *adapters: Tensors) -> dict[str, Tensor]:
    """W_0 + s B A of every adapted product, under the names of `Merged`."""
    config, weights = method.config, dict(Merged(clip).named_parameters())
    changed: dict[str, Tensor] = {}
    for adapter in adapters:
        for name, b in adapter.items():
            if not name.endswith("lora_B"):
                continue
            a = adapter[name.replace("lora_B", "lora_A")]
            tower, product, _ = name.split(".")
            tower = "model." if tower == "text" else "model.visual."
            first = len(clip.text.blocks) - len(b)
            for j in range(len(b)):
                key = f"{tower}transformer.resblocks.{first + j}."
                key += {
                    "out_proj": "attn.out_proj.weight",
                    "fc1": "mlp.c_fc.weight",
                    "fc2": "mlp.c_proj.weight",
                }.get(product, "attn.in_proj_weight")
                part = config.lora_alpha / b.shape[-1] * b[j] @ a[j]
                if product in ("q_proj", "k_proj", "v_proj"):
                    zero = torch.zeros_like(part)
                    part = torch.cat([part if product == p else zero for p in EVERY[:3]])
                changed[key] = changed.get(key, weights[key]) + part
    return changed


def adapters_of(method: Method, shared: Tensors, private: Tensors, k: int) -> list[Tensors]:
    """Client k's adapters as leaves of their own: A and B under the names of the method."""
    own = [{n: t[k].detach().requires_grad_() for n, t in c.items()} for c in (shared, private)]
    if method.config.sharing == "dual":
        return own
    fixed = {n: t[0] for n, t in method.fixed.items()}  # type: ignore[attr-defined]
    return [{**own[0], **own[1], **fixed}]


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize(
    "options",
    [
        {"text_layers": 3},
        {"text_layers": 1, "target_modules": EVERY, "r": 3, "lora_alpha": 2.0},
        {"text_layers": 2, "image_layers": 2, "target_modules": ["fc1", "v_proj", "out_proj"]},
        {"text_layers": 0, "image_layers": 3, "target_modules": ["q_proj", "fc2"]},
    ],
    ids=["text", "top layer", "both towers", "image"],
)
def test_twin(deep_clip: FrozenCLIP, sharing: str, options: Mapping[str, Any]) -> None:
    method = twins.build(deep_clip, "lora", sharing=sharing, private_r=4, **options)
    shared, private = twins.tensors(method, 0.2)
    batch = batch_for(method, deep_clip)
    encoded = method.encode(shared, private)
    logits = method.logits(encoded, batch.inputs)
    loss_K = method.loss_terms(shared, private, encoded, batch)["ce"]
    names = [*shared, *private]
    ours = torch.autograd.grad(loss_K.sum(), twins.leaves(shared, private))
    ids = deep_clip.tokenizer([f"a photo of a {n.replace('_', ' ')}." for n in CLASS_NAMES])
    for k in range(K):
        adapters = adapters_of(method, shared, private, k)
        weights = merged_weights(method, deep_clip, *adapters)
        pixels = batch.inputs.pixels
        images = batch.inputs.features[k] if pixels is None else pixels[k]
        theirs = torch.func.functional_call(Merged(deep_clip), weights, (ids, images))
        twins.close(logits[k], theirs, "logits")
        real = batch.mask_KB[k]
        loss = F.cross_entropy(theirs[real], batch.labels_KB[k][real])
        twins.close(loss_K[k], loss, "loss")
        leaves = [t for adapter in adapters for t in adapter.values() if t.requires_grad]
        expected = torch.autograd.grad(loss, leaves)
        for name, gradient, other in zip(names, ours, expected, strict=True):
            twins.close(gradient[k], other, name)


def test_the_start_is_zero_shot_clip(deep_clip: FrozenCLIP) -> None:
    method = twins.build(deep_clip, "lora", image_layers=3, target_modules=EVERY)
    shared = {n: t[None] for n, t in method.init_shared(1).items()}
    inputs = twins.pictures(deep_clip, 1, B)
    encoded = method.encode(shared, None)
    zero_shot = deep_clip.zero_shot_classifier(CLASS_NAMES, ("a photo of a {}.",))
    twins.close(encoded["classes"][0], zero_shot, rtol=1e-6)
    expected = deep_clip.logit_scale * inputs.features @ zero_shot.T
    twins.close(method.logits(encoded, inputs), expected, rtol=1e-5)
    draw = shared["text.q_proj.lora_A"]
    assert 0.9 < float(draw.max()) * math.sqrt(deep_clip.text.width) <= 1


def test_each_sharing_sends_its_factors() -> None:
    clip = shape_only_clip("ViT-B-16")
    # Three products of 512 x 512 in twelve layers, rank 2.
    half = 12 * 3 * 2 * 512
    sent = {s: uploaded_numbers(twins.build(clip, "lora", sharing=s)) for s in SHARINGS}
    assert sent == {"both": 2 * half, "ffa": half, "fedsa": half, "dual": 2 * half}
    both_towers = twins.build(clip, "lora", image_layers=12)
    assert uploaded_numbers(both_towers) == 2 * half + 12 * 3 * 2 * 2 * 768
    assert not twins.build(clip, "lora", sharing="fedsa").has_global
    for name in ("ffa", "both"):
        method = twins.build(clip, "lora", sharing=name)
        assert {n.rpartition(".")[2] for n in method.init_shared(0)} == (
            {"lora_B"} if name == "ffa" else {"lora_A", "lora_B"}
        )


def test_layers_below_are_computed_once(
    deep_clip: FrozenCLIP, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = twins.build(deep_clip, "lora", text_layers=1)
    shared, _ = twins.tensors(method)
    top = deep_clip.text_layers[-1]
    # A layer below the adapted one that is asked for anything would fail.
    monkeypatch.setattr(deep_clip, "text_layers", (None, None, top))
    method.encode(shared, {})


def test_a_long_class_list_in_parts(deep_clip: FrozenCLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task(tuple(f"class number {i}" for i in range(12)))
    whole = twins.build(deep_clip, "lora", task)
    monkeypatch.setattr(lora_text, "positions_at_once", lambda *_: 40)
    parts = twins.build(deep_clip, "lora", task)
    shared, _ = twins.tensors(whole)
    values, gradients = [], []
    for method in (whole, parts):
        classes = method.encode(shared, {})["classes"]
        values.append(classes)
        weight = twins.draw(*classes.shape)
        gradients.append(torch.autograd.grad((classes * weight).sum(), list(shared.values())))
    assert len(parts.texts[0]._chunks) > 1  # type: ignore[attr-defined]
    twins.close(*values)
    for ours, theirs in zip(*gradients, strict=True):
        twins.close(ours, theirs)


def test_product_mean_of_clients_is_the_mean_model(deep_clip: FrozenCLIP) -> None:
    """With room for all ranks the global weights are the mean of the clients'; FedAvg's are not."""
    options = {"r": 2 * K, "text_layers": 2, "target_modules": ["v_proj", "fc1"]}
    method = twins.build(deep_clip, "lora", **options)
    start = method.init_shared(1)
    rows = {n: t.clone() for n, t in twins.tensors(method, 0.3)[0].items()}
    for n, t in rows.items():
        # Each client has used two of the ranks only.
        (t[:, :, 2:] if n.endswith("A") else t[..., 2:]).zero_()
    weights = [1, 5, 2]
    updates = [
        Update(k, {n: t[k].detach().numpy() for n, t in rows.items()}, weights[k]) for k in range(K)
    ]
    shared = {n: t.numpy() for n, t in start.items()}
    products = {}
    for name in ("product_mean", "fedavg"):
        cls = strategy_class(name)
        strategy = cls(cls.Config(), shapes={n: a.shape for n, a in shared.items()}, seed=1)
        new = {n: torch.from_numpy(a) for n, a in strategy.aggregate(1, shared, updates).items()}
        products[name] = merged_weights(method, deep_clip, new)
        if name == "product_mean":
            assert strategy.metrics()["product_error"] < 1e-7
    each = [merged_weights(method, deep_clip, {n: t[k] for n, t in rows.items()}) for k in range(K)]
    for key, ours in products["product_mean"].items():
        mean = sum(w * e[key] for w, e in zip(weights, each, strict=True)) / sum(weights)
        twins.close(ours, mean, key, rtol=1e-6)
        assert float((products["fedavg"][key] - mean).detach().abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"target_modules": ["q_proj", "o_proj"]}, "o_proj"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": ["fc1", "fc1"]}, "target_modules"),
        ({"text_layers": 0}, "image_layers"),
        ({"template": "a photo"}, "template"),
        ({"sharing": "none"}, "sharing"),
    ],
)
def test_refusals(clip: FrozenCLIP, options: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        twins.build(clip, "lora", **options)


def test_other_towers_are_refused() -> None:
    resnet = random_resnet_clip()
    assert twins.build(resnet, "lora").has_global
    with pytest.raises(UserError, match="vision transformer"):
        twins.build(resnet, "lora", image_layers=1)
