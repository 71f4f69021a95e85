"""Metrics against scikit-learn and against numbers worked out by hand, ties included."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.metrics import (
    average_precision_score,
    confusion_matrix,
    roc_auc_score,
    roc_curve,
)

from fedprompt.evaluation.metrics import (
    Reliability,
    auroc,
    average_precision,
    confusion,
    fpr_at_tpr,
    gini,
    harmonic_mean,
    jain,
    mean_of_lowest,
)

# Few different values, so that most scores are tied with others.
SCORES = st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 1.0]), min_size=1, max_size=60)


def test_harmonic_mean_by_hand() -> None:
    assert harmonic_mean(0.6, 0.3) == pytest.approx(0.4)
    assert harmonic_mean(0.5, 0.5) == pytest.approx(0.5)
    assert harmonic_mean(0.0, 0.9) == 0.0
    assert harmonic_mean(0.0, 0.0) == 0.0


@given(SCORES, SCORES)
def test_detection_agrees_with_scikit_learn(known: list[float], other: list[float]) -> None:
    labels, scores = [1] * len(known) + [0] * len(other), [*known, *other]
    assert auroc(known, other) == pytest.approx(roc_auc_score(labels, scores))
    expected = average_precision_score(labels, scores)
    assert average_precision(known, other) == pytest.approx(expected)
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    assert fpr_at_tpr(known, other) == pytest.approx(fpr[tpr >= 0.95 - 1e-12].min())


def test_detection_by_hand() -> None:
    known, other = [0.9, 0.8, 0.5, 0.5], [0.5, 0.2, 0.1]
    # 12 pairs: 10 are right, the two ties of 0.5 count one half each.
    assert auroc(known, other) == pytest.approx(11 / 12)
    # Thresholds .9, .8 and .5 let in 1, 2 and 4 known images among 1, 2 and 5.
    assert average_precision(known, other) == pytest.approx((1 + 1 + 2 * 4 / 5) / 4)
    assert fpr_at_tpr(known, other) == pytest.approx(1 / 3)
    assert fpr_at_tpr(known, other, tpr=0.5) == 0.0
    assert auroc([1.0], [0.0]) == 1.0
    assert auroc([0.0], [1.0]) == 0.0


def test_the_95th_percent_of_twenty_images_is_nineteen() -> None:
    known = list(range(1, 21))
    assert fpr_at_tpr(known, [1.5, 1.9, 2.5]) == pytest.approx(1 / 3)


@pytest.mark.parametrize("bad", [[], [float("nan")], [[0.1]]])
def test_scores_that_are_none_are_refused(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="scores"):
        auroc(bad, [0.5])


def test_calibration_by_hand() -> None:
    # Bins (0, .5] and (.5, 1]: 0.5 lies in the lower one.
    r = Reliability.of([0.5, 0.4, 0.9, 0.7], [1, 0, 1, 0], bins=2)
    assert r.count_M.tolist() == [2, 2]
    assert r.gaps_M == pytest.approx([0.45 - 0.5, 0.8 - 0.5])
    assert r.expected_error == pytest.approx((0.05 * 2 + 0.3 * 2) / 4)
    assert r.maximum_error == pytest.approx(0.3)
    assert Reliability.of([0.0, 1.0], [0, 1], bins=10).count_M.tolist() == [1, *[0] * 8, 1]


@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.2, 0.35, 0.4, 0.99, 1.0]), st.booleans()), min_size=4
    )
)
def test_calibration_agrees_with_scikit_learn(images: list[tuple[float, bool]]) -> None:
    confidence = np.array([c for c, _ in images])
    correct = np.array([hit for _, hit in images], dtype=int)
    ours = Reliability.of(confidence, correct, bins=5)
    if 0 < correct.sum() < len(correct):  # theirs needs both kinds
        accuracy, mean = calibration_curve(correct, confidence, n_bins=5)
        filled = ours.count_M > 0
        assert np.abs(ours.gaps_M[filled]) == pytest.approx(np.abs(accuracy - mean), abs=1e-12)
        expected = np.average(np.abs(accuracy - mean), weights=ours.count_M[filled])
        assert ours.expected_error == pytest.approx(expected, abs=1e-12)
    half = len(images) // 2
    parts = [
        Reliability.of(confidence[rows], correct[rows], bins=5)
        for rows in (slice(half), slice(half, None))
    ]
    both = parts[0] + parts[1]
    assert both.expected_error == pytest.approx(ours.expected_error, abs=1e-12)
    assert sum(ours.to_json()["count"]) == len(images)


def test_an_empty_bin_has_no_mean() -> None:
    part = Reliability.of([0.9], [1], bins=2).to_json()
    assert part["confidence"] == [None, 0.9]
    assert part["accuracy"] == [None, 1.0]
    assert Reliability.of([], [], bins=3).expected_error == 0.0


def test_confusion_agrees_with_scikit_learn() -> None:
    draw = np.random.default_rng(0)
    labels, predictions = draw.integers(0, 5, (2, 200))
    assert (confusion(labels, predictions, 5) == confusion_matrix(labels, predictions)).all()
    assert confusion([0, 0, 2], [0, 1, 2], 3).tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]


def test_spread_over_clients_by_hand() -> None:
    # All pairs of 1, 3: differences 0, 2, 2, 0, mean 1; twice the mean is 4.
    assert gini([1.0, 3.0]) == pytest.approx(0.25)
    assert gini([0.3, 0.3, 0.3]) == pytest.approx(0.0)
    assert gini([0.0, 0.0, 0.0, 1.0]) == pytest.approx(0.75)
    assert gini([0.0, 0.0]) == 0.0
    assert jain([1.0, 3.0]) == pytest.approx(16 / 20)
    assert jain([0.5, 0.5]) == pytest.approx(1.0)
    assert jain([0.0, 0.0, 0.0, 1.0]) == pytest.approx(0.25)
    assert jain([0.0]) == 1.0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_gini_is_the_mean_difference_of_all_pairs(values: list[float]) -> None:
    x = np.array(values)
    if x.sum() > 1e-6:
        expected = np.abs(x[:, None] - x[None]).mean() / (2 * x.mean())
        assert gini(values) == pytest.approx(expected, abs=1e-9)


def test_mean_of_the_lowest_tenth() -> None:
    assert mean_of_lowest(np.arange(20) / 20) == pytest.approx(0.025)
    assert mean_of_lowest([0.9, 0.1, 0.5]) == pytest.approx(0.1)
    assert mean_of_lowest(np.arange(21) / 20) == pytest.approx((0 + 0.05 + 0.1) / 3)
    assert mean_of_lowest([0.2, 0.4], share=1.0) == pytest.approx(0.3)
