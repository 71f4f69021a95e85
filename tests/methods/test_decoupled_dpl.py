"""Decoupled DPL: the attention as two attentions, mixed by lambda; both image paths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import shape_only_clip
from fedprompt.backbone.vision_tower import VisionTower
from fedprompt.errors import UserError
from fedprompt.methods.base import uploaded_numbers
from tests.support import twins
from tests.support.builders import batch_of, random_clip

K, B = 2, 3
LABELS = torch.tensor([[0, 1, 2], [5, 4, 0]])


@pytest.fixture(scope="module")
def clip() -> FrozenCLIP:
    return random_clip(vision_cfg={"patch_size": 16, "layers": 4})


def decoupled(x: Tensor, seen: int, attn: Any, gain: float) -> Tensor:
    """Self-attention of (L, w): instances come first, and mix two attentions by lambda."""
    heads, size = attn.num_heads, x.shape[-1] // attn.num_heads
    q, k, v = (x @ attn.in_proj_weight.T + attn.in_proj_bias).chunk(3, dim=-1)
    out = []
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        scores = (q[:, part] @ k[:, part].T / size**0.5).exp()
        of_x, of_p = scores[:, :seen], scores[:, seen:]
        instances = of_x / of_x.sum(-1, keepdim=True) @ v[:seen, part]
        prompts = of_p / of_p.sum(-1, keepdim=True) @ v[seen:, part]
        share = (of_p.sum(-1) / (of_x.sum(-1) + of_p.sum(-1)))[:, None]
        gained = gain * share / (1 - share + gain * share)
        # Only the instances' own queries see prompts with a gain.
        share = torch.cat([gained[:seen], share[seen:]])
        out.append((1 - share) * instances + share * prompts)
    return torch.cat(out, dim=-1) @ attn.out_proj.weight.T + attn.out_proj.bias


def twin_images(clip: FrozenCLIP, pixels: Tensor, prompts: list[Tensor], gain: float) -> Tensor:
    visual = clip.model.visual
    rows = []
    for image in pixels:
        patches = visual.conv1(image[None]).flatten(2).transpose(1, 2)[0]
        x = torch.cat([visual.class_embedding[None], patches]) + visual.positional_embedding
        seen = len(x)
        x = visual.ln_pre(torch.cat([x, prompts[0]]))
        for layer, block in enumerate(visual.transformer.resblocks):
            if 0 < layer < len(prompts):
                x = torch.cat([x[:seen], prompts[layer]])
            x = x + decoupled(block.ln_1(x), seen, block.attn, gain)
            x = x + block.mlp(block.ln_2(x))
        rows.append(F.normalize(visual.ln_post(x[0]) @ visual.proj, dim=-1))
    return torch.stack(rows)


@pytest.mark.parametrize(("gain", "depth"), [(2.0, 3), (0.5, 1), (3.0, 4)])
def test_twin(clip: FrozenCLIP, gain: float, depth: int) -> None:
    options = {"prompt_attn_gain": gain, "visual_depth": depth, "text_depth": 2}
    method = twins.build(clip, "decoupled_dpl", **options)
    shared, _ = twins.tensors(method, 0.3, clients=K)
    batch = batch_of(twins.pictures(clip, K, B), LABELS)
    encoded = method.encode(shared, {})
    logits = method.logits(encoded, batch.inputs)
    terms = method.loss_terms(shared, {}, encoded, batch)
    ours = twins.gradients(terms, list(shared.values()))
    assert batch.inputs.pixels is not None
    for k in range(K):
        leaves = [t.detach()[k].clone().requires_grad_() for t in shared.values()]
        images = twin_images(clip, batch.inputs.pixels[k], list(leaves[1]), gain)
        classes = twins.plain_text(clip, "a photo of a", list(leaves[0]))
        expected = clip.logit_scale * images @ classes.T
        twins.close(logits[k], expected)
        loss = F.cross_entropy(expected, LABELS[k])
        for mine, theirs in zip(ours, torch.autograd.grad(loss, leaves), strict=True):
            twins.close(mine[k], theirs)


def test_a_gain_of_one_is_ivlp_and_others_are_not(clip: FrozenCLIP) -> None:
    ivlp, inputs = twins.build(clip, "ivlp"), twins.pictures(clip, K, B)
    shared, _ = twins.tensors(ivlp, clients=K)
    expected = ivlp.logits(ivlp.encode(shared, {}), inputs)
    for gain, same in ((1.0, True), (2.0, False)):
        method = twins.build(clip, "decoupled_dpl", prompt_attn_gain=gain)
        assert torch.equal(method.logits(method.encode(shared, {}), inputs), expected) == same


def test_the_plain_path_of_the_tower_has_the_gain(clip: FrozenCLIP) -> None:
    tower = VisionTower(clip, 2.0)
    pixels = twins.pictures(clip, K, B).pixels
    assert pixels is not None
    prompts = twins.draw(K, 3, 2, tower.width, seed=5)
    fast, fast_patches = tower(pixels, prompts[:, 0], prompts[:, 1:], patches=True)
    tower.fast = False
    plain, plain_patches = tower(pixels, prompts[:, 0], prompts[:, 1:], patches=True)
    twins.close(fast, plain)
    twins.close(fast_patches, plain_patches)


def test_upload_on_vit_b16() -> None:
    assert uploaded_numbers(twins.build(shape_only_clip("ViT-B-16"), "decoupled_dpl")) == 30_720


@pytest.mark.parametrize("gain", [0, -1.0])
def test_bad_gains(clip: FrozenCLIP, gain: float) -> None:
    with pytest.raises(UserError, match="prompt_attn_gain"):
        twins.build(clip, "decoupled_dpl", prompt_attn_gain=gain)
