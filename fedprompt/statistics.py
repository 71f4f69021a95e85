"""Statistics that results are made of: standard deviations, and precision and recall of labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def sample_std(values: Sequence[float]) -> float | None:
    """Return the sample standard deviation, which divides by n - 1.

    Seeds and clients are samples of those that could have been drawn. Dividing by n would give the
    spread of these few alone, which is 18 % too small for three seeds.

    Args:
        values: The sample.

    Returns:
        The standard deviation, None for fewer than two values, whose spread is unknown.
    """
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def average_precision(known_N: Floats, other_N: Floats) -> float:
    """Area under the precision-recall curve, as a sum of steps without interpolation.

    Args:
        known_N: scores of the positives; at least one.
        other_N: scores of all others. Equal scores form one step.

    Returns:
        A fraction in (0, 1].
    """
    known_N, other_N = np.sort(known_N), np.sort(other_N)
    # Recall only rises at scores of known images, so these are the only thresholds that count.
    levels = np.unique(known_N)[::-1]
    true = len(known_N) - np.searchsorted(known_N, levels, side="left")
    false = len(other_N) - np.searchsorted(other_N, levels, side="left")
    gained = np.diff(true, prepend=0)
    return float((gained * true / (true + false)).sum() / len(known_N))


def mean_average_precision(scores_NC: Floats, targets_NC: NDArray[np.bool_]) -> float | None:
    """mAP: the mean of `average_precision` over the labels that some image has.

    Args:
        scores_NC: how likely each image has each label; not NaN.
        targets_NC: which labels each image has.

    Returns:
        A fraction, equal to scikit-learn's macro average over these labels. None if no image has a
        label.
    """
    each = [
        average_precision(scores_N[has_N], scores_N[~has_N])
        for scores_N, has_N in zip(scores_NC.T, targets_NC.T, strict=True)
        if has_N.any()
    ]
    return float(np.mean(each)) if each else None


def f1_scores(found_NC: NDArray[np.bool_], targets_NC: NDArray[np.bool_]) -> tuple[float, float]:
    """Micro and macro F1 of predicted sets of labels.

    Args:
        found_NC: which labels are predicted for each image.
        targets_NC: which labels each image has.

    Returns:
        F1 of all decisions together, and the mean over the labels that some image has.
    """
    hits_C = 2 * (found_NC & targets_NC).sum(axis=0)
    both_C = found_NC.sum(axis=0) + targets_NC.sum(axis=0)
    there_C = targets_NC.any(axis=0)
    micro = float(hits_C.sum() / both_C.sum()) if both_C.sum() else 0.0
    macro = float((hits_C[there_C] / both_C[there_C]).mean()) if there_C.any() else 0.0
    return micro, macro
