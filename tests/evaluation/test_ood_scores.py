"""Scores of known classes, on small exact numbers; the choice of negative words."""

from __future__ import annotations

import math

import pytest
import torch

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.negative_words import everyday_nouns, negative_words
from fedprompt.errors import UserError
from fedprompt.evaluation.ood_scores import energy, highest_probability, neg_label

LOGITS = torch.tensor([[0.0, math.log(3.0)], [2.0, 2.0]])


def test_msp_mcm_and_energy() -> None:
    assert highest_probability(LOGITS) == pytest.approx([0.75, 0.5])
    # Divided by log 3, the first logits are 0 and 1.
    assert highest_probability(LOGITS, math.log(3.0))[0] == pytest.approx(1 / (1 + math.exp(-1)))
    assert energy(LOGITS) == pytest.approx([math.log(4.0), 2 + math.log(2.0)])


def test_neg_label_is_the_share_of_the_class_names() -> None:
    negative = torch.tensor([[0.0], [-math.inf]])
    assert neg_label(LOGITS, negative) == pytest.approx([4 / 5, 1.0])


def test_neg_label_averages_over_groups_of_a_hundred_words() -> None:
    """Every second word is of the second group."""
    negative = torch.full((1, 200), -math.inf)
    negative[0, 0], negative[0, 1] = math.log(4.0), math.log(12.0)
    assert neg_label(LOGITS[:1], negative) == pytest.approx([(1 / 2 + 1 / 4) / 2])


def test_negative_words_are_the_least_like_all_names(clip: FrozenCLIP) -> None:
    names = ("apple", "dense_forest", "river")
    words = negative_words(clip, names, 50, "here")
    assert len(set(words)) == 50
    assert "apple" not in words
    of_names = clip.zero_shot_classifier(names, ["The nice {}."])

    def alike(some: tuple[str, ...]) -> torch.Tensor:
        # With three names, the 95th percentile is the largest.
        return (clip.zero_shot_classifier(some, ["The nice {}."]) @ of_names.T).amax(-1)

    others = tuple(set(everyday_nouns()) - {*words, "apple"})
    taken = alike(words)
    assert bool((taken.diff() >= -1e-6).all()), "the least alike first"
    assert float(alike(others).min()) >= float(taken.max()) - 1e-6


def test_more_words_than_there_are(clip: FrozenCLIP) -> None:
    with pytest.raises(UserError, match=r"'here' is 9999"):
        negative_words(clip, ("apple",), 9999, "here")
