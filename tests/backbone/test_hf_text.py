"""Text towers of Hugging Face against a plain `inputs_embeds` pass in transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.text_tokens import context_init
from fedprompt.backbone.text_tower import TextTower
from fedprompt.backbone.token_rows import specials_before
from fedprompt.errors import UserError
from tests.support.builders import CLASS_NAMES
from tests.support.comparison import relative
from tests.support.hub_models import CONFIGS, CONTEXT_LENGTH, hf_clip

RTOL = 1e-4
TEXTS = {
    "end": "seen from above here {}.",
    "middle": "seen from {} above here.",
    "front": "{} seen from above here.",
}
POOLERS = ("cls_pooler", "mean_pooler", "cls_last_hidden_state_pooler")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def twin(clip: FrozenCLIP, position: str, context: Tensor, deep: Tensor | None = None) -> Tensor:
    """Class features of one prompt over all positions, by transformers itself.

    Deep prompts are placed by a loop over BERT's own layers.
    """
    ids = clip.tokenizer([TEXTS[position].format(name) for name in CLASS_NAMES])
    text = clip.model.text
    words = clip.tokenizer(["seen from above here"])[0][specials_before(clip.tokenizer) :]
    inside = torch.isin(ids, words[:4])
    assert (inside.sum(-1) == 4).all()
    x = text.transformer.get_input_embeddings()(ids)
    x = x.masked_scatter(inside[..., None], context.expand(len(ids), -1, -1))
    mask = (ids != text.config.pad_token_id).long()
    if deep is None:
        out = text.transformer(inputs_embeds=x, attention_mask=mask)
        return text.proj(text.pooler(out, mask))
    x = text.transformer.embeddings(inputs_embeds=x)
    hidden = torch.zeros(mask.shape).masked_fill(mask == 0, float("-inf"))[:, None, None]
    for i, layer in enumerate(text.transformer.encoder.layer):
        if 0 < i <= len(deep):
            x = x.masked_scatter(inside[..., None], deep[i - 1].expand(len(ids), -1, -1))
        out = layer(x, hidden)
        x = out[0] if isinstance(out, tuple) else out  # before transformers 5
    return text.proj(x[:, 0])


@pytest.mark.parametrize("position", TEXTS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_hard_prompts_equal_encode_text(tmp_path: Path, kind: str, position: str) -> None:
    clip = hf_clip(tmp_path, kind)
    tower = TextTower(clip, CLASS_NAMES, 4, position=position)  # type: ignore[arg-type]
    context = context_init(clip, "seen from above here", 4, torch.empty(0))
    expected = clip.encode_text_raw([TEXTS[position].format(name) for name in CLASS_NAMES])
    assert relative(tower(context), expected) < RTOL
    assert tower.positions < len(CLASS_NAMES) * CONTEXT_LENGTH / 8, "padding is not computed"
    packed = clip.encode_texts([TEXTS[position].format(name) for name in CLASS_NAMES])
    assert relative(packed, expected) < RTOL


@pytest.mark.parametrize(
    ("kind", "pooler"), [("bert", p) for p in POOLERS] + [(k, "mean_pooler") for k in CONFIGS]
)
def test_values_and_gradients_equal_a_plain_pass(tmp_path: Path, kind: str, pooler: str) -> None:
    clip = hf_clip(tmp_path, kind, pooler)
    context = draw(2, 4, 32).requires_grad_()
    for position in TEXTS if kind in ("bert", "mt5") else ("end",):
        ours = TextTower(clip, CLASS_NAMES, 4, position=position)(context)  # type: ignore[arg-type]
        plain = torch.stack([twin(clip, position, c) for c in context])
        assert relative(ours, plain) < RTOL
        weight = draw(*ours.shape, seed=2)
        a, b = (torch.autograd.grad((t * weight).sum(), context)[0] for t in (ours, plain))
        assert b.abs().max() > 0
        assert relative(a, b) < RTOL


def test_deep_prompts_equal_a_loop_over_the_layers(tmp_path: Path) -> None:
    clip = hf_clip(tmp_path, "bert", "cls_last_hidden_state_pooler")
    inputs = [draw(4, 32).requires_grad_(), draw(2, 4, 32, seed=1).requires_grad_()]
    for position in TEXTS:
        ours = TextTower(clip, CLASS_NAMES, 4, position=position)(*inputs)  # type: ignore[arg-type]
        plain = twin(clip, position, *inputs)
        assert relative(ours, plain) < RTOL
        weight = draw(*ours.shape, seed=2)
        gradients = (torch.autograd.grad((t * weight).sum(), inputs) for t in (ours, plain))
        for a, b in zip(*gradients, strict=True):
            assert b.abs().max() > 0
            assert relative(a, b) < RTOL
    assert not clip.model.text.transformer.encoder.layer[1]._forward_pre_hooks


@pytest.mark.parametrize("kind", CONFIGS)
def test_deep_prompts_reach_every_layer(tmp_path: Path, kind: str) -> None:
    clip = hf_clip(tmp_path, kind)
    deep = draw(2, 4, 32).requires_grad_()
    TextTower(clip, CLASS_NAMES, 4)(draw(4, 32), deep).square().sum().backward()
    assert deep.grad is not None
    assert (deep.grad.abs().amax((1, 2)) > 0).all()
    with pytest.raises(UserError, match="3 deep prompts"):
        TextTower(clip, CLASS_NAMES, 4)(draw(4, 32), draw(3, 4, 32))


def test_adapters_are_refused_by_the_name_of_the_blocks(tmp_path: Path) -> None:
    tower = TextTower(hf_clip(tmp_path, "bert"), CLASS_NAMES, 4)
    with pytest.raises(UserError, match=r"adapters .*BertLayer"):
        tower(draw(1, 4, 32), adapt=lambda *_: None)


def test_a_name_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    clip = hf_clip(tmp_path, "bert")
    long = " ".join(["river"] * 300)
    with pytest.raises(UserError, match="positions"):
        TextTower(clip, [long], 4)
    with pytest.raises(UserError, match="special token"):
        TextTower(clip, ["river [SEP]"], 4)
