"""CLIP under deep prompts as the public MaPLe and PromptSRC code runs it: one client, loops.

Every class goes through all 77 text positions, every image through all patches; the prompts of a
layer replace the hidden states that the layer before has left. Written for tests, apart from the
towers of the library.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.data.features.inputs import Inputs
from tests.support.builders import CLASS_NAMES


def plain_text(clip: FrozenCLIP, prefix: str, prompts_JMd: list[Tensor]) -> Tensor:
    """Features (C, D), normalised; tokens 1 .. M of "{prefix} {class}." are replaced."""
    model, tokens = clip.model, prompts_JMd[0].shape[0]
    rows = []
    for name in CLASS_NAMES:
        ids = clip.tokenizer([f"{prefix} {name}."])
        x = model.token_embedding(ids)
        x = torch.cat([x[:, :1], prompts_JMd[0][None], x[:, 1 + tokens :]], dim=1)
        x = x + model.positional_embedding
        for layer, block in enumerate(model.transformer.resblocks):
            if 0 < layer < len(prompts_JMd):
                x = torch.cat([x[:, :1], prompts_JMd[layer][None], x[:, 1 + tokens :]], dim=1)
            x = block(x, attn_mask=model.attn_mask)
        x = model.ln_final(x)[0, int(ids.argmax())] @ model.text_projection
        rows.append(x / x.norm())
    return torch.stack(rows)


def plain_images(clip: FrozenCLIP, pixels_B3HW: Tensor, prompts_JMw: list[Tensor]) -> Tensor:
    """Features (B, D), normalised; `prompts_JMw` may be empty."""
    visual = clip.model.visual
    rows = []
    for image in pixels_B3HW:
        patches = visual.conv1(image[None]).flatten(2).transpose(1, 2)
        x = torch.cat([visual.class_embedding[None, None], patches], dim=1)
        x = x + visual.positional_embedding
        seen = x.shape[1]
        if prompts_JMw:
            x = torch.cat([x, prompts_JMw[0][None]], dim=1)
        x = visual.ln_pre(x)
        for layer, block in enumerate(visual.transformer.resblocks):
            if 0 < layer < len(prompts_JMw):
                x = torch.cat([x[:, :seen], prompts_JMw[layer][None]], dim=1)
            x = block(x)
        x = visual.ln_post(x[0, 0]) @ visual.proj
        rows.append(x / x.norm())
    return torch.stack(rows)


def images_of(clip: FrozenCLIP, clients: int, images: int) -> Inputs:
    """Random pictures (K, B, 3, H, W) with their frozen features."""
    size = clip.model.visual.image_size
    draw = torch.Generator().manual_seed(3)
    pixels = torch.randn(clients, images, 3, *size, generator=draw)
    features = clip.encode_images(pixels.flatten(0, 1)).unflatten(0, (clients, images))
    return Inputs(F.normalize(features, dim=-1), pixels=pixels)


def moved(
    tensors: dict[str, Tensor], clients: int, seed: int, by: float = 0.05
) -> dict[str, Tensor]:
    """Different tensors for each client, as leaves."""
    draw = torch.Generator().manual_seed(seed)
    return {
        n: (t + by * torch.randn(clients, *t.shape, generator=draw)).requires_grad_()
        for n, t in tensors.items()
    }


def close(ours: Tensor, theirs: Tensor, rtol: float = 1e-4) -> None:
    """Equal up to `rtol` of the largest value."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= rtol * theirs.abs().max()
