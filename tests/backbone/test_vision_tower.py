"""The image tower under prompts: the fast path, open_clip's own blocks, and a loop over images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.vision_tower import VisionTower
from fedprompt.bench.counting import count_gflop
from fedprompt.errors import UserError
from tests.support.builders import random_clip, random_resnet_clip
from tests.support.comparison import relative

RTOL = 1e-4
K, B, M, WIDTH, PATCHES = 2, 3, 4, 64, 16


@pytest.fixture(scope="module")
def four_layers() -> FrozenCLIP:
    return random_clip(vision_cfg={"layers": 4})


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pixels(clients: int = K, images: int = B) -> Tensor:
    return draw(clients, images, 3, 32, 32, seed=9)


def leaves(layers: int, clients: int = K, tokens: int = M) -> list[Tensor]:
    """Prompts (K, M, w) and, where there are any, deep ones (K, J, M, w)."""
    shapes = [(clients, tokens, WIDTH)] + [(clients, layers, tokens, WIDTH)] * bool(layers)
    return [(0.5 * draw(*s, seed=i)).requires_grad_() for i, s in enumerate(shapes)]


def plain(clip: FrozenCLIP) -> VisionTower:
    tower = VisionTower(clip)
    tower.fast = False
    return tower


def loop(clip: FrozenCLIP, images: Tensor, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Features and patches, one client and one image at a time, every position of every layer."""
    visual = clip.model.visual
    rows = []
    for k in range(images.shape[0]):
        shallow, deep = inputs[0][k], inputs[1][k] if len(inputs) > 1 else []
        for image in images[k]:
            patches_Pw = visual.conv1(image[None])[0].flatten(1).T
            x = torch.cat([visual.class_embedding[None], patches_Pw])
            x = torch.cat([x + visual.positional_embedding, shallow])
            x = visual.ln_pre(x)[None]
            for i, block in enumerate(visual.transformer.resblocks):
                if 0 < i <= len(deep):
                    x = torch.cat([x[:, : 1 + PATCHES], deep[i - 1][None]], dim=1)
                x = block(x)
            rows.append(visual.ln_post(x[0, : 1 + PATCHES]) @ visual.proj)
    tokens = torch.stack(rows).unflatten(0, images.shape[:2])
    return tokens[:, :, 0], tokens[:, :, 1:]


def assert_same(
    ours: Callable[[], Any], theirs: Callable[[], Any], inputs: list[Tensor], rtol: float = RTOL
) -> None:
    """Same values and same gradients of a weighted sum."""
    results = []
    for run in (ours, theirs):
        out = run()
        parts = list(out) if isinstance(out, tuple) else [out]
        total = sum((p * draw(*p.shape, seed=i)).sum() for i, p in enumerate(parts))
        results.append([*parts, *torch.autograd.grad(total, inputs)])
    for a, b in zip(*results, strict=True):
        assert a.shape == b.shape
        assert b.abs().max() > 0
        assert relative(a, b) < rtol


@pytest.mark.parametrize("path", [VisionTower, plain])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_without_prompts_it_is_encode_image(
    path: Callable[[FrozenCLIP], VisionTower], precision: str
) -> None:
    clip = random_clip()
    clip.precision = precision
    expected = clip.encode_images(pixels().flatten(0, 1)).unflatten(0, (K, B))
    features = path(clip)(pixels())
    assert features.dtype == torch.float32
    assert relative(features, expected) < (1e-5 if precision == "float32" else 0.03)


@pytest.mark.parametrize("layers", [0, 1, 2, 3])
@pytest.mark.parametrize("path", [VisionTower, plain])
def test_prompts_of_any_depth(
    four_layers: FrozenCLIP, path: Callable[[FrozenCLIP], VisionTower], layers: int
) -> None:
    tower, inputs = path(four_layers), leaves(layers)
    assert_same(
        lambda: tower(pixels(), *inputs, patches=True),
        lambda: loop(four_layers, pixels(), inputs),
        inputs,
    )
    assert_same(
        lambda: tower(pixels(), *inputs), lambda: loop(four_layers, pixels(), inputs)[0], inputs
    )
    assert all(p.grad is None for p in four_layers.model.parameters())


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("deep", [0, 1])
def test_short_towers(layers: int, deep: int) -> None:
    if deep >= layers:
        return
    clip, inputs = random_clip(vision_cfg={"layers": layers}), leaves(deep)
    tower = VisionTower(clip)
    assert_same(lambda: tower(pixels(), *inputs), lambda: loop(clip, pixels(), inputs)[0], inputs)


@pytest.mark.parametrize(
    "changes",
    [
        {"quick_gelu": True},
        {"vision_cfg": {"ls_init_value": 0.5}},
        {"vision_cfg": {"act_kwargs": {"approximate": "tanh"}}},
        {"vision_cfg": {"no_ln_pre": True}},
    ],
)
def test_kinds_of_blocks(changes: dict[str, Any]) -> None:
    clip, inputs = random_clip(**changes), leaves(1)
    tower = VisionTower(clip)
    assert tower.fast
    assert_same(lambda: tower(pixels(), *inputs), lambda: loop(clip, pixels(), inputs)[0], inputs)


@pytest.mark.parametrize("path", [VisionTower, plain])
@pytest.mark.parametrize(("image_clients", "prompt_clients"), [(1, 3), (3, 1)])
def test_a_client_axis_of_one_broadcasts(
    four_layers: FrozenCLIP,
    path: Callable[[FrozenCLIP], VisionTower],
    image_clients: int,
    prompt_clients: int,
) -> None:
    tower, inputs = path(four_layers), leaves(2, prompt_clients)
    images = pixels(image_clients)

    def twin() -> Tensor:
        every = [t.expand(3, *t.shape[1:]) for t in inputs]
        return loop(four_layers, images.expand(3, -1, -1, -1, -1), every)[0]

    assert_same(lambda: tower(images, *inputs), twin, inputs)
    shallow = inputs[0].detach()[:1]
    mixed = tower(images, shallow, inputs[1])  # the deep prompts alone differ by client
    assert mixed.shape == (3, B, 32)
    assert relative(mixed[2:], tower(images[-1:], shallow, inputs[1][-1:])) < 1e-5


def test_clients_at_once_are_clients_alone(four_layers: FrozenCLIP) -> None:
    tower, inputs, images = VisionTower(four_layers), leaves(2), pixels()
    together = tower(images, *inputs)
    grads = torch.autograd.grad(together.square().sum(), inputs)
    for k in range(K):
        prompts = [t.detach()[k : k + 1].requires_grad_() for t in inputs]
        alone = tower(images[k : k + 1], *prompts)
        assert relative(together[k : k + 1], alone) < 1e-5
        for a, b in zip(grads, torch.autograd.grad(alone.square().sum(), prompts), strict=True):
            assert relative(a[k : k + 1], b) < RTOL


def test_two_gradients_of_one_pass(four_layers: FrozenCLIP) -> None:
    """Methods that project gradients take those of several sums."""
    tower, inputs = VisionTower(four_layers), leaves(2)
    out = tower(pixels(), *inputs)
    first = torch.autograd.grad(out[..., 0].sum(), inputs, retain_graph=True)
    again = torch.autograd.grad(out[..., 0].sum(), inputs, retain_graph=True)
    other = torch.autograd.grad(out[..., 1].sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(relative(a, b) > 0.01 for a, b in zip(other, first, strict=True))


@pytest.mark.parametrize("which", [0, 1])
def test_one_kind_of_prompt_may_be_frozen(four_layers: FrozenCLIP, which: int) -> None:
    tower, inputs = VisionTower(four_layers), leaves(2)
    expected = torch.autograd.grad(tower(pixels(), *inputs).sum(), inputs)[which]
    for i, tensor in enumerate(inputs):
        tensor.requires_grad_(i == which)
    gradient = torch.autograd.grad(tower(pixels(), *inputs).sum(), inputs[which])[0]
    assert torch.equal(gradient, expected)


def test_bf16_is_near_float32(four_layers: FrozenCLIP) -> None:
    clip = random_clip(vision_cfg={"layers": 4})
    clip.precision = "bf16"
    inputs = leaves(2)
    for path in (VisionTower, plain):
        assert_same(
            lambda path=path: path(clip)(pixels(), *inputs, patches=True),  # type: ignore[misc]
            lambda: loop(four_layers, pixels(), inputs),
            inputs,
            rtol=0.05,
        )


def test_prompts_change_features_and_deep_ones_change_them_again(four_layers: FrozenCLIP) -> None:
    tower, (shallow, deep) = VisionTower(four_layers), leaves(2)
    none, some, all_ = tower(pixels()), tower(pixels(), shallow), tower(pixels(), shallow, deep)
    assert relative(some, none) > 0.01
    assert relative(all_, some) > 0.01


def test_positions_are_counted(four_layers: FrozenCLIP) -> None:
    clip, tower = four_layers, VisionTower(four_layers)
    before = clip.positions_encoded
    tower(pixels())
    assert clip.positions_encoded - before == K * B * (1 + PATCHES)
    before = clip.positions_encoded
    tower(pixels(1), leaves(0, clients=3)[0])
    assert clip.positions_encoded - before == 3 * B * (1 + PATCHES + M)


@pytest.mark.parametrize("layers", [0, 3])
def test_the_fast_path_computes_less(four_layers: FrozenCLIP, layers: int) -> None:
    """It saves most in the last of four layers, which runs at one position of 21."""
    inputs = leaves(layers)

    def cost(tower: VisionTower) -> float:
        return count_gflop(lambda: tower(pixels(), *inputs).sum().backward())

    saved = 1 - cost(VisionTower(four_layers)) / cost(plain(four_layers))
    assert saved > (0.2 if layers == 0 else 0.3)


def test_adapters_add_to_the_output_of_blocks(four_layers: FrozenCLIP) -> None:
    tower, weight = VisionTower(four_layers), (0.1 * draw(3, WIDTH, WIDTH)).requires_grad_()

    def adapt(layer: int, block: Any, x: Tensor) -> Tensor | None:
        assert x.dim() == 4
        return None if layer < 2 else block.ln_1(x) @ weight[:, None]

    features = tower(pixels(1), adapt=adapt)  # three clients come in at the third layer
    visual = four_layers.model.visual
    for k in range(3):
        x = visual._embeds(pixels(1)[0])
        for i, block in enumerate(visual.transformer.resblocks):
            x = block(x) + (block.ln_1(x) @ weight[k] if i >= 2 else 0)
        assert relative(features[k], visual.ln_post(x[:, 0]) @ visual.proj) < 1e-5
    assert torch.equal(tower(pixels(), adapt=lambda *_: None), plain(four_layers)(pixels()))


def test_wrong_use_is_one_clear_line(four_layers: FrozenCLIP) -> None:
    with pytest.raises(UserError, match=r"resnet .*ModifiedResNet.* ViT"):
        VisionTower(random_resnet_clip())
    tower, (shallow, deep) = VisionTower(four_layers), leaves(4)
    with pytest.raises(UserError, match=r"4 deep .* 3 "):
        tower(pixels(), shallow, deep)
    with pytest.raises(UserError, match="deep"):
        tower(pixels(), None, deep[:, :2])
