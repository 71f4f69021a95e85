"""Visual prompts in image towers besides open_clip's plain one, against a pass of their own."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import torch
from open_clip.model import CustomTextCLIP
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.patch_features import dense_encoder
from fedprompt.backbone.vision_tower import VisionTower
from fedprompt.errors import UserError
from tests.support.builders import RANDOM_CLIP, random_clip
from tests.support.comparison import relative
from tests.support.small_timm import shrink_timm

RTOL = 1e-4
K, B, M = 2, 2, 3
TIMM: dict[str, dict[str, Any]] = {
    "SigLIP": {
        "timm_model_name": "vit_base_patch16_siglip_224",
        "timm_pool": "map",
        "timm_proj": "none",
    },
    "EVA-02": {
        "timm_model_name": "eva02_base_patch16_clip_224",
        "timm_pool": "token",
        "timm_proj": None,
    },
    "EVA-01": {
        "timm_model_name": "eva_giant_patch14_clip_224",
        "timm_pool": "token",
        "timm_proj": None,
    },
    "PE": {
        "timm_model_name": "vit_pe_core_base_patch16_224",
        "timm_pool": "map",
        "timm_proj": None,
    },
    "BiomedCLIP": {
        "timm_model_name": "vit_base_patch16_224",
        "timm_pool": "",
        "timm_proj": "linear",
    },
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def timm_clip(kind: str, monkeypatch: pytest.MonkeyPatch) -> FrozenCLIP:
    """A CLIP with a small tower of timm, in which every weight matters."""
    shrink_timm(monkeypatch)
    vision = {"image_size": 32, **TIMM[kind]}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CustomTextCLIP(
            embed_dim=48, vision_cfg=vision, text_cfg=dict(RANDOM_CLIP["text_cfg"])
        )
        for parameter in model.visual.parameters():
            parameter.data = parameter.data + 0.2 * torch.randn_like(parameter)
    return FrozenCLIP(model, open_clip.SimpleTokenizer(), name=kind, weights_hash="seed 0")


def twin(clip: FrozenCLIP, pixels: Tensor, prompts: Tensor, deep: Tensor) -> Tensor:
    """Features of one client's images, with the prompts after the class token.

    Attention knows no order but that of the rotation, from which timm spares the first tokens.
    """
    trunk = clip.model.visual.trunk
    first = trunk.num_prefix_tokens
    found = trunk._pos_embed(trunk.patch_embed(pixels))
    x, rotation = found if isinstance(found, tuple) else (found, None)

    def placed(x: Tensor, prompts: Tensor) -> Tensor:
        return torch.cat([x[:, :first], prompts.expand(len(x), -1, -1), x[:, first:]], dim=1)

    x = trunk.norm_pre(placed(x, prompts))
    for i, block in enumerate(trunk.blocks):
        if 0 < i <= len(deep):
            x = placed(torch.cat([x[:, :first], x[:, first + M :]], dim=1), deep[i - 1])
        if rotation is None:
            x = block(x)
            continue
        block.attn.num_prefix_tokens += M
        x = block(x, rope=rotation)
        block.attn.num_prefix_tokens -= M
    x = torch.cat([x[:, :first], x[:, first + M :]], dim=1)
    return clip.model.visual.head(trunk.forward_head(trunk.norm(x)))


@pytest.mark.parametrize("kind", TIMM)
def test_prompts_in_towers_of_timm(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = timm_clip(kind, monkeypatch)
    tower, pixels = VisionTower(clip), draw(K, B, 3, 32, 32, seed=9)
    assert not tower.fast
    assert (tower.layers, tower.width, tower.patches, tower.patch_size) == (2, 48, 16, (8, 8))
    plain = clip.encode_images(pixels.flatten(0, 1)).unflatten(0, (K, B))
    assert relative(tower(pixels), plain) < 1e-5
    inputs = [draw(K, M, 48).requires_grad_(), draw(K, 1, M, 48, seed=1).requires_grad_()]
    ours = tower(pixels, *inputs)
    theirs = torch.stack([twin(clip, pixels[k], *(t[k] for t in inputs)) for k in range(K)])
    assert relative(ours, plain) > 0.01
    assert relative(ours, theirs) < RTOL
    weight = draw(*ours.shape, seed=2)
    gradients = (torch.autograd.grad((t * weight).sum(), inputs) for t in (ours, theirs))
    for a, b in zip(*gradients, strict=True):
        assert b.abs().max() > 0
        assert relative(a, b) < RTOL


OWN: dict[str, dict[str, Any]] = {
    "CLIPA": {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
    "CoCa": {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": False},
    "layer scale": {"ls_init_value": 0.1},
}


@pytest.mark.parametrize("kind", OWN)
def test_prompts_in_other_towers_of_open_clip(kind: str) -> None:
    """Class token, mean and attention pool are read without the prompts."""
    clip = random_clip(vision_cfg=OWN[kind])
    tower, pixels = VisionTower(clip), draw(K, B, 3, 32, 32, seed=9)
    plain = clip.encode_images(pixels.flatten(0, 1)).unflatten(0, (K, B))
    assert relative(tower(pixels), plain) < 1e-5
    prompts = draw(K, M, 64).requires_grad_()
    ours = tower(pixels, prompts)
    visual = clip.model.visual
    theirs = []
    for k in range(K):
        x = visual._embeds(pixels[k])
        entered = visual.ln_pre(prompts[k]).expand(B, -1, -1)
        x = visual.transformer(torch.cat([x, entered], dim=1))
        theirs.append(visual._pool(x[:, : x.shape[1] - M])[0] @ visual.proj)
    reference = torch.stack(theirs)
    assert relative(ours, plain) > 1e-3
    assert relative(ours, reference) < RTOL
    weight = draw(*ours.shape, seed=2)
    a, b = (torch.autograd.grad((t * weight).sum(), prompts)[0] for t in (ours, reference))
    assert relative(a, b) < RTOL


def test_what_a_tower_of_timm_does_not_have_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    clip = timm_clip("EVA-02", monkeypatch)
    tower, pixels = VisionTower(clip), draw(1, 1, 3, 32, 32)
    with pytest.raises(UserError, match=r"EVA-02 .*patches"):
        tower(pixels, patches=True)
    with pytest.raises(UserError, match=r"adapters .*EvaBlock"):
        tower(pixels, adapt=lambda *_: None)
    with pytest.raises(UserError, match="2 deep visual prompts"):
        tower(pixels, draw(1, M, 48), draw(1, 2, M, 48))
    assert dense_encoder(clip) is None
