"""Pre-Forgettable: twin of both sets of tokens, what unlearning leaves out, and its upload."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import shape_only_clip
from fedprompt.errors import UserError
from fedprompt.methods.base import Batch, uploaded_numbers
from fedprompt.rng import uniform
from tests.support import twins
from tests.support.builders import batch_of

K, B, C = 2, 4, 6
LABELS = torch.tensor([[0, 1, 3, 3], [5, 4, 0, 1]])
MASK = torch.tensor([[True] * 4, [True] * 3 + [False]])


def pictures(clip: FrozenCLIP, step: int) -> Batch:
    return batch_of(twins.pictures(clip, K, B), LABELS, MASK, step=step)


def size_of(purpose: str, step: int) -> int:
    return int(C * float(uniform((1,), 1, "subset size", purpose, 1, step)))


def twin_logits(
    clip: FrozenCLIP, tokens: Tensor, batch: Batch, k: int, i: int, purpose: str
) -> Tensor:
    """One image's logits under the tokens that its draw picks."""
    label, own = int(batch.labels_KB[k, i]), purpose == "mixed"
    draw = uniform((B, 2, C), 1, "subsets", batch.step, 1, k)[i, int(not own)]
    others = sorted((c for c in range(C) if c != label), key=lambda c: float(draw[c]))
    picked = [label] * own + others[: size_of(purpose, batch.step)]
    assert batch.inputs.pixels is not None
    image = batch.inputs.pixels[k, i : i + 1]
    feature = twins.plain_images(clip, image, [tokens[picked]] if picked else [])[0]
    return clip.logit_scale * twins.template_features(clip) @ feature


@pytest.mark.parametrize("step", [0, 9, 11, 22])
def test_twin(clip: FrozenCLIP, step: int) -> None:
    method = twins.build(clip, "pre_forgettable", wrong_weight=0.5)
    shared, batch = twins.tensors(method, 0.3, K)[0], pictures(clip, step)
    terms = twins.loss_of(method, shared, {}, batch)
    ours = twins.applied_gradients(method, shared, batch)["tokens"]
    for k in range(K):
        tokens = shared["tokens"].detach()[k].clone().requires_grad_()
        real = range(int(MASK[k].sum()))
        mixed, wrong = (
            torch.stack([twin_logits(clip, tokens, batch, k, i, purpose) for i in real])
            for purpose in ("mixed", "wrong")
        )
        ce = F.cross_entropy(mixed, LABELS[k, : len(real)])
        uniform_C = torch.full((C,), 1 / C)
        kl = F.kl_div(wrong.log_softmax(-1), uniform_C.expand_as(wrong), reduction="batchmean")
        twins.close(terms["ce"][k], ce, "ce")
        twins.close(terms["wrong"][k], 0.5 * kl, "wrong")
        (theirs,) = torch.autograd.grad(ce + 0.5 * kl, tokens)
        twins.close(ours[k], theirs, "gradient")


def test_the_steps_above_have_both_empty_and_large_sets() -> None:
    sizes = [(size_of("mixed", s), size_of("wrong", s)) for s in (0, 9, 11, 22)]
    assert 0 in {wrong for _, wrong in sizes}
    assert max(mixed for mixed, _ in sizes) >= C // 2


def test_a_forgotten_class_takes_its_token_away(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "pre_forgettable")
    shared = {n: t.detach()[0] for n, t in twins.tensors(method, 0.3, 1)[0].items()}
    inputs = pictures(clip, 0).inputs[:1]

    def features_with(tokens: list[Tensor]) -> Tensor:
        assert inputs.pixels is not None
        return twins.plain_images(clip, inputs.pixels[0], tokens)

    classes = twins.template_features(clip)
    for forgotten in ([], [2], [0, 5], range(C)):
        kept = method.without_classes(shared, list(forgotten))
        assert kept is not None
        found = method.logits(method.encode({n: t[None] for n, t in kept.items()}, None), inputs)
        own = shared["tokens"][[c for c in range(C) if c not in forgotten]]
        expected = clip.logit_scale * features_with([own] if len(own) else []) @ classes.T
        twins.close(found[0], expected)


def test_wrappers_forget_as_their_base_does(clip: FrozenCLIP) -> None:
    wrapped = twins.build(clip, "fedprox", base="pre_forgettable")
    kept = wrapped.without_classes(wrapped.init_shared(1), [0, 1])
    assert kept is not None
    assert len(kept["tokens"]) == C - 2
    plain = twins.build(clip, "fedprox", base="promptfl", options={"context_tokens": 2})
    assert plain.without_classes(plain.init_shared(1), [0]) is None


def test_start(clip: FrozenCLIP) -> None:
    start = twins.build(clip, "pre_forgettable").init_shared(1)["tokens"]
    assert start.shape == (C, clip.model.visual.positional_embedding.shape[1])
    assert float(start.std()) == pytest.approx(1, rel=0.1)
    weightless = twins.build(clip, "pre_forgettable", wrong_weight=0)
    terms = twins.loss_of(weightless, twins.tensors(weightless, 0.3, K)[0], {}, pictures(clip, 0))
    assert set(terms) == {"ce"}
    assert all(math.isfinite(v) for v in terms["ce"].tolist())


def test_upload_on_vit_b16() -> None:
    method = twins.build(shape_only_clip("ViT-B-16"), "pre_forgettable")
    assert uploaded_numbers(method) == C * (768 + 1)


@pytest.mark.parametrize("options", [{"init_std": 0}, {"wrong_weight": -1}, {"template": "photo"}])
def test_bad_options(clip: FrozenCLIP, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        twins.build(clip, "pre_forgettable", **options)
