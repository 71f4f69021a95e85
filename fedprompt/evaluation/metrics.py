"""Metrics that papers report, as plain functions of arrays.

They agree with scikit-learn's where it has the same metric (tested). Suffixes: N images, K clients,
C classes, M bins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def harmonic_mean(a: float, b: float) -> float:
    """2ab / (a + b) of two numbers >= 0; 0 where one of them is 0."""
    return 2 * a * b / (a + b) if a > 0 and b > 0 else 0.0


# Two sets of scores: images of the known classes should score higher than all others.


def auroc(known: ArrayLike, other: ArrayLike) -> float:
    """Area under the ROC: the probability that a known image scores higher than another one.

    Args:
        known: scores of images of known classes (N,), the positives.
        other: scores of all other images (N,).

    Returns:
        A fraction; ties count one half.
    """
    known_N, other_N = _scores(known), np.sort(_scores(other))
    below = np.searchsorted(other_N, known_N, side="left")
    not_above = np.searchsorted(other_N, known_N, side="right")
    return float((below + not_above).sum() / (2 * len(known_N) * len(other_N)))


def fpr_at_tpr(known: ArrayLike, other: ArrayLike, tpr: float = 0.95) -> float:
    """False positive rate at the highest threshold with a true positive rate of at least `tpr`.

    Args:
        known: scores of images of known classes (N,), the positives.
        other: scores of all other images (N,).
        tpr: fraction of known images that must be accepted. An image is accepted if its score is
            at least the threshold.

    Returns:
        Fraction of the other images that are accepted.
    """
    known_N, other_N = np.sort(_scores(known)), _scores(other)
    # Rounded first, so that float noise does not make 20 of 0.95 x 20 images.
    accepted = max(1, math.ceil(round(tpr * len(known_N), 9)))
    return float((other_N >= known_N[-accepted]).mean())


def average_precision(known: ArrayLike, other: ArrayLike) -> float:
    """Area under precision over recall, as a sum of steps without interpolation.

    Args:
        known: scores of images of known classes (N,), the positives.
        other: scores of all other images (N,). Images of equal score enter together.
    """
    known_N, other_N = np.sort(_scores(known)), np.sort(_scores(other))
    levels = np.unique(known_N)[::-1]
    true = len(known_N) - np.searchsorted(known_N, levels, side="left")
    false = len(other_N) - np.searchsorted(other_N, levels, side="left")
    gained = np.diff(true, prepend=0)
    return float((gained * true / (true + false)).sum() / len(known_N))


def _scores(values: ArrayLike) -> Floats:
    scores_N = np.asarray(values, dtype=np.float64)
    if scores_N.ndim != 1 or not len(scores_N) or np.isnan(scores_N).any():
        raise ValueError("scores must be a non-empty row of numbers")
    return scores_N


# Calibration


@dataclass(frozen=True)
class Reliability:
    """Sums over images in M bins of confidence of equal width; sums of parts can be added.

    Bin m, counted from 1, holds confidences in ((m - 1) / M, m / M]. The first also holds 0.

    Attributes:
        count_M: images per bin.
        confidence_M: sum of their confidences.
        correct_M: how many of them are classified correctly.
    """

    count_M: Ints
    confidence_M: Floats
    correct_M: Ints

    @classmethod
    def of(cls, confidence: ArrayLike, correct: ArrayLike, bins: int) -> Reliability:
        """Sums over images.

        Args:
            confidence: confidence of every prediction (N,), in [0, 1].
            correct: whether it is correct (N,).
            bins: number of bins M.
        """
        confidence_N = np.asarray(confidence, dtype=np.float64)
        correct_N = np.asarray(correct, dtype=np.int64)
        edges = np.linspace(0, 1, bins + 1)[1:-1]
        bin_N = np.searchsorted(edges, confidence_N, side="left")
        return cls(
            count_M=np.bincount(bin_N, minlength=bins).astype(np.int64),
            confidence_M=np.bincount(bin_N, confidence_N, minlength=bins).astype(np.float64),
            correct_M=np.bincount(bin_N[correct_N > 0], minlength=bins).astype(np.int64),
        )

    def __add__(self, other: Reliability) -> Reliability:
        """The sums over the images of both."""
        return Reliability(
            self.count_M + other.count_M,
            self.confidence_M + other.confidence_M,
            self.correct_M + other.correct_M,
        )

    @property
    def gaps_M(self) -> Floats:
        """Mean confidence minus accuracy of each bin; 0 if it is empty."""
        return (self.confidence_M - self.correct_M) / np.maximum(self.count_M, 1)

    @property
    def expected_error(self) -> float:
        """ECE: mean absolute gap, weighted by images (Guo et al., ICML 2017)."""
        total = self.count_M.sum()
        return float((np.abs(self.gaps_M) * self.count_M).sum() / total) if total else 0.0

    @property
    def maximum_error(self) -> float:
        """MCE: the largest absolute gap of a bin with images."""
        return float(np.abs(self.gaps_M).max())

    def to_json(self) -> dict[str, Any]:
        """Both errors, and per bin the count, mean confidence and accuracy (None if empty)."""

        def mean(sums_M: Floats | Ints) -> list[float | None]:
            pairs = zip(sums_M.tolist(), self.count_M.tolist(), strict=True)
            return [s / n if n else None for s, n in pairs]

        return {
            "ece": self.expected_error,
            "mce": self.maximum_error,
            "count": self.count_M.tolist(),
            "confidence": mean(self.confidence_M),
            "accuracy": mean(self.correct_M),
        }


def confusion(labels: ArrayLike, predictions: ArrayLike, classes: int) -> Ints:
    """Confusion matrix.

    Args:
        labels: true classes (N,).
        predictions: predicted classes (N,).
        classes: number of classes C.

    Returns:
        Images by true class (rows) and predicted class (columns), (C, C).
    """
    cells = np.asarray(labels, dtype=np.int64) * classes + np.asarray(predictions, dtype=np.int64)
    counts: Ints = np.bincount(cells, minlength=classes**2).astype(np.int64)
    return counts.reshape(classes, classes)


# How evenly something is spread over clients


def gini(values: ArrayLike) -> float:
    """Gini coefficient of numbers >= 0: 0 if all are equal, (K - 1) / K if one has everything.

    It is the mean absolute difference of all K^2 pairs over twice the mean, and 0 if all are 0.
    """
    sorted_K = np.sort(np.asarray(values, dtype=np.float64))
    clients, total = len(sorted_K), sorted_K.sum()
    if total == 0:
        return 0.0
    rank_K = 2 * np.arange(1, clients + 1) - clients - 1
    return float((rank_K * sorted_K).sum() / (clients * total))


def jain(values: ArrayLike) -> float:
    """Jain's index (sum x)^2 / (K sum x^2): 1 if all are equal, 1 / K if one has everything.

    Source: Jain, Chiu and Hawe, DEC TR-301, 1984. It is 1 if all numbers are 0.
    """
    values_K = np.asarray(values, dtype=np.float64)
    squares = float((values_K**2).sum())
    return float(values_K.sum() ** 2 / (len(values_K) * squares)) if squares else 1.0


def mean_of_lowest(values: ArrayLike, share: float = 0.1) -> float:
    """Mean of the lowest values: a fraction `share` of them, rounded up, one or more."""
    sorted_K = np.sort(np.asarray(values, dtype=np.float64))
    return float(sorted_K[: max(1, math.ceil(round(share * len(sorted_K), 9)))].mean())
