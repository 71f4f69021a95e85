"""The masked text path against open_clip's own blocks, on values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedprompt.backbone import isolated_text
from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.isolated_text import IsolatedText
from fedprompt.errors import UserError
from tests.support import twins
from tests.support.builders import random_clip
from tests.support.isolated_text import isolated_features

TEXTS = [f"a photo of a {name}." for name in ("river", "permanent crop land", "sea or lake")]
M = 3


@pytest.fixture(scope="module")
def deep_clip() -> FrozenCLIP:
    return random_clip(text_cfg={"layers": 3})


def contexts(clip: FrozenCLIP) -> Tensor:
    return 0.3 * twins.draw(2, M, clip.text.width, seed=4)


@pytest.mark.parametrize("bias", [0.0, 0.7])
def test_features_and_gradients_are_those_of_the_plain_pass(
    deep_clip: FrozenCLIP, bias: float
) -> None:
    tower = IsolatedText(deep_clip, TEXTS, M, bias)
    ours = contexts(deep_clip).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    found = tower(ours)
    plain = torch.stack([isolated_features(deep_clip, TEXTS, c, bias) for c in theirs])
    twins.close(found, plain)
    weights = twins.draw(*found.shape, seed=5)
    (gradient,) = torch.autograd.grad((found * weights).sum(), ours)
    (expected,) = torch.autograd.grad((plain * weights).sum(), theirs)
    twins.close(gradient, expected)


def test_chunks_of_classes_give_the_same_features_and_gradients(
    deep_clip: FrozenCLIP, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower, values = IsolatedText(deep_clip, TEXTS, M, 0.5), contexts(deep_clip)
    found = {}
    for rows in (1000, 2 * (M + 1) * 2):
        monkeypatch.setattr(isolated_text, "positions_at_once", lambda *_, rows=rows: rows)
        leaf = values.clone().requires_grad_()
        features = tower(leaf)
        (gradient,) = torch.autograd.grad(features.square().sum(), leaf)
        found[rows] = features.detach(), gradient
    (whole, chunked) = found.values()
    twins.close(chunked[0], whole[0], rtol=1e-6)
    twins.close(chunked[1], whole[1], rtol=1e-5)


def test_words_do_not_read_the_context_but_the_end_does(deep_clip: FrozenCLIP) -> None:
    """Moving one token moves the features; without a context they are the plain text's."""
    tower, values = IsolatedText(deep_clip, TEXTS, M, 0.0), contexts(deep_clip)
    other = values.clone()
    other[:, 0] += 1
    assert not torch.allclose(tower(values), tower(other))
    nothing = IsolatedText(deep_clip, TEXTS, 0, 0.0)(values[:, :0])
    twins.close(nothing[0], deep_clip.encode_text_raw(TEXTS))


def test_a_text_that_does_not_fit_and_another_tower_are_refused(deep_clip: FrozenCLIP) -> None:
    with pytest.raises(UserError, match=r"needs 82 text positions, but .* has 77"):
        IsolatedText(deep_clip, ["a photo of a river."], 74, 0.0)
    shallow = random_clip(text_cfg={"layers": 1})
    with pytest.raises(UserError, match="choose another backbone"):
        IsolatedText(shallow, TEXTS, M, 0.0)
