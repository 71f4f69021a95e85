"""The fast text tower against the plain pass over all positions, on values and gradients."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import torch
from open_clip.model import CustomTextCLIP
from torch import Tensor

from fedprompt.backbone import text_sequences
from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.text_tokens import context_init
from fedprompt.backbone.text_tower import TextTower
from fedprompt.bench.reference import reference_class_features
from fedprompt.errors import UserError
from tests.support.builders import CLASS_NAMES, RANDOM_CLIP, random_clip
from tests.support.comparison import relative

RTOL = 1e-4
NAMES = (
    *CLASS_NAMES,
    "a class with a rather long descriptive name",
    "a class with a short one",
    CLASS_NAMES[0],
)
"""Two begin alike, and one occurs twice."""


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.02 * torch.randn(*shape, generator=generator)


def assert_equals_reference(
    clip: FrozenCLIP, lead: tuple[int, ...], tokens: int, layers: int, **options: Any
) -> TextTower:
    """Same features and same gradients of contexts and deep prompts."""
    tower = TextTower(clip, NAMES, tokens, **options)
    per_class = (len(NAMES),) if options.get("class_specific") else ()
    inputs = [draw(*lead, *per_class, tokens, clip.text.width).requires_grad_()]
    if layers:
        inputs.append(draw(*lead, layers, tokens, clip.text.width, seed=1).requires_grad_())
    ours = tower(*inputs)
    reference = reference_class_features(tower, *inputs)
    assert ours.shape == (*lead, len(NAMES), clip.embed_dim)
    assert relative(ours, reference) < RTOL
    weight = draw(*ours.shape, seed=2)
    ours_grad = torch.autograd.grad((ours * weight).sum(), inputs)
    reference_grad = torch.autograd.grad((reference * weight).sum(), inputs)
    for a, b in zip(ours_grad, reference_grad, strict=True):
        assert b.abs().max() > 0
        assert relative(a, b) < RTOL
    return tower


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
@pytest.mark.parametrize("layers", [0, 2])
def test_shared_prefix_equals_all_77_positions(
    clip: FrozenCLIP, lead: tuple[int, ...], layers: int
) -> None:
    assert assert_equals_reference(clip, lead, 4, layers).fast


@pytest.mark.parametrize("tokens", [1, 16])
def test_any_number_of_context_tokens(clip: FrozenCLIP, tokens: int) -> None:
    assert_equals_reference(clip, (2,), tokens, 0)


@pytest.mark.parametrize("position", ["middle", "front"])
@pytest.mark.parametrize("layers", [0, 2])
def test_the_name_stands_elsewhere(clip: FrozenCLIP, position: str, layers: int) -> None:
    tower = assert_equals_reference(clip, (2,), 4, layers, position=position)
    assert tower.fast
    assert tower.transformer is None
    end = TextTower(clip, NAMES, 4)
    assert relative(tower(draw(4, 64)), end(draw(4, 64))) > 0.01


@pytest.mark.parametrize("position", ["end", "middle"])
def test_class_specific_contexts(clip: FrozenCLIP, position: str) -> None:
    assert_equals_reference(clip, (2,), 4, 1, class_specific=True, position=position)


def test_class_specific_with_equal_contexts_is_the_unified_prompt(clip: FrozenCLIP) -> None:
    context = draw(4, 64)
    unified = TextTower(clip, NAMES, 4)(context)
    specific = TextTower(clip, NAMES, 4, class_specific=True)(context.expand(len(NAMES), 4, 64))
    assert relative(specific, unified) < RTOL


def test_one_transformer_layer_is_not_packed() -> None:
    """The first layer would be the last one as well."""
    clip = random_clip(text_cfg={"layers": 1})
    assert assert_equals_reference(clip, (2,), 4, 0).transformer is None


@pytest.mark.parametrize("options", [{"class_specific": True}, {"position": "middle"}])
def test_chunks_of_classes_are_computed_again_for_the_gradient(
    clip: FrozenCLIP, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """The same values and gradients; autograd keeps no more than one chunk and the contexts."""
    kept = []
    for bytes_at_once in (2**30, 2**18):
        monkeypatch.setitem(text_sequences.BYTES_AT_ONCE, "cpu", bytes_at_once)
        assert_equals_reference(clip, (2,), 4, 2, **options)
        sizes: list[int] = []

        def keep(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        tower = TextTower(clip, NAMES, 4, **options)
        shape = (len(NAMES), 4, 64) if tower.class_specific else (4, 64)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            tower(draw(*shape).requires_grad_())
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 10


@pytest.mark.parametrize("layers", [2, 5])
def test_number_of_transformer_layers(layers: int) -> None:
    clip = random_clip(text_cfg={"layers": layers})
    assert assert_equals_reference(clip, (2,), 4, layers - 1).fast


def test_quick_gelu_and_layer_scale() -> None:
    clip = random_clip(text_cfg={"ls_init_value": 0.5}, quick_gelu=True)
    assert assert_equals_reference(clip, (2,), 4, 1).fast


def test_tanh_gelu() -> None:
    kwargs = {"act_kwargs": {"approximate": "tanh"}}
    assert assert_equals_reference(random_clip(text_cfg=kwargs), (2,), 4, 1).fast


def test_many_classes_in_several_bins(clip: FrozenCLIP) -> None:
    names = [f"{a} {b}" for a in ("old", "new", "small red") for b in map(chr, range(97, 123))]
    tower = TextTower(clip, names, 4)
    assert tower.transformer is not None
    assert tower.transformer.layout.bins > 1
    context, weight = draw(3, 4, 64).requires_grad_(), draw(3, len(names), 32, seed=2)
    ours, reference = tower(context), reference_class_features(tower, context)
    assert relative(ours, reference) < RTOL
    ours_grad, reference_grad = (
        torch.autograd.grad((t * weight).sum(), context)[0] for t in (ours, reference)
    )
    assert relative(ours_grad, reference_grad) < RTOL


def test_gradient_can_be_taken_twice(clip: FrozenCLIP) -> None:
    """Methods that compare the gradients of two losses use the same graph twice."""
    context = draw(2, 4, 64).requires_grad_()
    out = TextTower(clip, NAMES, 4)(context)
    first = torch.autograd.grad(out.sum(), context, retain_graph=True)[0]
    second = torch.autograd.grad(out.sum(), context)[0]
    assert torch.equal(first, second)


def test_a_graph_is_freed_after_backward(clip: FrozenCLIP) -> None:
    context = draw(2, 4, 64).requires_grad_()
    out = TextTower(clip, NAMES, 4)(context)
    out.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.sum().backward()


def test_more_deep_prompts_than_layers_are_refused(clip: FrozenCLIP) -> None:
    with pytest.raises(UserError, match="deep"):
        TextTower(clip, NAMES, 4)(draw(4, 64), draw(99, 4, 64))


def test_hard_prompts_equal_encode_text(clip: FrozenCLIP) -> None:
    words = "a photo of a"
    context = context_init(clip, words, 4, torch.empty(0))
    for options in ({}, {"position": "end", "class_specific": True}):
        tower = TextTower(clip, NAMES, 4, **options)  # type: ignore[arg-type]
        value = context.expand(len(NAMES), 4, 64) if tower.class_specific else context
        expected = clip.encode_text_raw([f"{words} {name}." for name in NAMES])
        assert relative(tower(value), expected) < RTOL


def test_middle_and_front_hard_prompts_equal_encode_text(clip: FrozenCLIP) -> None:
    context = context_init(clip, "seen from above here", 4, torch.empty(0))
    front = TextTower(clip, NAMES, 4, position="front")(context)
    expected = clip.encode_text_raw([f"{name} seen from above here." for name in NAMES])
    assert relative(front, expected) < RTOL
    middle = TextTower(clip, NAMES, 4, position="middle")(context)
    expected = clip.encode_text_raw([f"seen from {name} above here." for name in NAMES])
    assert relative(middle, expected) < RTOL


def test_class_order_only_permutes_the_features(clip: FrozenCLIP) -> None:
    context = draw(2, 4, 64)
    forward = TextTower(clip, NAMES, 4)(context)
    backward = TextTower(clip, NAMES[::-1], 4)(context)
    assert relative(backward.flip(1), forward) < 1e-5


def test_gradients_reach_prompts_and_no_weights(clip: FrozenCLIP) -> None:
    context = draw(4, 64).requires_grad_()
    TextTower(clip, NAMES, 4)(context).sum().backward()
    assert context.grad is not None
    assert all(p.grad is None and not p.requires_grad for p in clip.model.parameters())


def _siglip_like() -> FrozenCLIP:
    """Not causal, no [SOS], pooled at the last position, padded with the end token."""
    text = {**RANDOM_CLIP["text_cfg"], "no_causal_mask": True, "pool_type": "last"}  # type: ignore[dict-item]
    text |= {"context_length": 24}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CustomTextCLIP(embed_dim=32, vision_cfg=RANDOM_CLIP["vision_cfg"], text_cfg=text)
    tokenizer = open_clip.SimpleTokenizer(context_length=24)

    def tokenise(texts: list[str], context_length: int = 24) -> Tensor:
        rows = tokenizer(texts, context_length=context_length + 1)[:, 1:]
        end = tokenizer.eot_token_id
        return torch.where(rows == 0, torch.full_like(rows, end), rows)

    return FrozenCLIP(model, tokenise, name="siglip-like", weights_hash="seed 0")


@pytest.mark.parametrize("position", ["end", "middle"])
def test_towers_that_are_not_causal_take_the_plain_path(position: str) -> None:
    clip = _siglip_like()
    tower = assert_equals_reference(clip, (2,), 4, 0, position=position)
    assert not tower.fast
    assert tower.first == 0


def test_hard_prompts_of_a_tower_that_is_not_causal() -> None:
    clip = _siglip_like()
    context = context_init(clip, "a photo of a", 4, torch.empty(0))
    expected = clip.encode_text_raw([f"a photo of a {name}." for name in NAMES])
    assert relative(TextTower(clip, NAMES, 4)(context), expected) < RTOL


def test_custom_text_clip_with_a_causal_tower_is_fast() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CustomTextCLIP(**RANDOM_CLIP)  # type: ignore[arg-type]
    clip = FrozenCLIP(model, open_clip.SimpleTokenizer(), name="custom", weights_hash="0")
    assert assert_equals_reference(clip, (2,), 4, 1).fast


def test_pooling_at_a_named_end_token() -> None:
    eot = open_clip.SimpleTokenizer().eot_token_id
    clip = random_clip(text_cfg={"pool_type": "eos", "eos_id": eot})
    assert assert_equals_reference(clip, (2,), 4, 0).fast


def test_bfloat16_stays_close_and_returns_float32(clip: FrozenCLIP) -> None:
    half = FrozenCLIP(clip.model, clip.tokenizer, name="random", weights_hash="0", precision="bf16")
    context = draw(2, 4, 64)
    ours, exact = TextTower(half, NAMES, 4)(context), TextTower(clip, NAMES, 4)(context)
    assert ours.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(ours, exact, dim=-1).min() > 0.999
    assert relative(ours, exact) > 1e-5


def test_a_name_that_does_not_fit_is_refused(clip: FrozenCLIP) -> None:
    with pytest.raises(UserError, match=r"'(word ){80}word'.*77"):
        TextTower(clip, ["river", " ".join(["word"] * 81)], 4)
    # 77 positions: [SOS], 4 context tokens, 70 words, the full stop, [EOT].
    assert TextTower(clip, [" ".join(["word"] * 70)], 4)(draw(4, 64)).shape == (1, 32)
    with pytest.raises(UserError, match="78"):
        TextTower(clip, [" ".join(["word"] * 71)], 4)


def test_context_init_needs_as_many_words_as_tokens(clip: FrozenCLIP) -> None:
    with pytest.raises(UserError, match=r"'a photo of a'.* 4 .*context_tokens.* 5"):
        context_init(clip, "a photo of a", 5, torch.empty(0))
