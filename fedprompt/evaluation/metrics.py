"""Numbers that papers report, as plain functions of arrays.

Where scikit-learn has the same quantity the two agree (tested). Suffixes: N images, K clients, C
classes, M bins.
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
    """Chance that a known image scores higher than another one; ties count one half."""
    known_N, other_N = _scores(known), np.sort(_scores(other))
    below = np.searchsorted(other_N, known_N, side="left")
    not_above = np.searchsorted(other_N, known_N, side="right")
    return float((below + not_above).sum() / (2 * len(known_N) * len(other_N)))


def fpr_at_tpr(known: ArrayLike, other: ArrayLike, tpr: float = 0.95) -> float:
    """Share of other images let in by the highest threshold that lets in `tpr` of the known ones.

    An image is let in where its score is at least the threshold.
    """
    known_N, other_N = np.sort(_scores(known)), _scores(other)
    # Rounded, so that 0.95 of 20 images is 19 and not, by float noise, 20.
    wanted = max(1, math.ceil(round(tpr * len(known_N), 9)))
    return float((other_N >= known_N[-wanted]).mean())


def average_precision(known: ArrayLike, other: ArrayLike) -> float:
    """Area under precision over recall, known images positive, as a sum of steps.

    No interpolation, and images of one score enter together.
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
    """Images in M equal-width bins of confidence; sums, so that parts can be added up.

    Bin m (from 1) holds confidences in ((m - 1) / M, m / M]; the first one also holds 0.
    """

    count_M: Ints
    confidence_M: Floats
    correct_M: Ints

    @classmethod
    def of(cls, confidence: ArrayLike, correct: ArrayLike, bins: int) -> Reliability:
        """From each image's confidence in [0, 1] and whether its prediction is correct."""
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
        """All images of both."""
        return Reliability(
            self.count_M + other.count_M,
            self.confidence_M + other.confidence_M,
            self.correct_M + other.correct_M,
        )

    @property
    def gaps_M(self) -> Floats:
        """Mean confidence minus accuracy of each bin; 0 where it is empty."""
        return (self.confidence_M - self.correct_M) / np.maximum(self.count_M, 1)

    @property
    def expected_error(self) -> float:
        """ECE: the gaps' absolute values, weighted by images (Guo et al., ICML 2017)."""
        total = self.count_M.sum()
        return float((np.abs(self.gaps_M) * self.count_M).sum() / total) if total else 0.0

    @property
    def maximum_error(self) -> float:
        """MCE: the largest absolute gap of a bin that holds an image."""
        return float(np.abs(self.gaps_M).max())

    def to_json(self) -> dict[str, Any]:
        """Counts, and per bin mean confidence and accuracy (null where a bin is empty)."""

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
    """Images by true class (rows) and predicted class (columns), (C, C)."""
    cells = np.asarray(labels, dtype=np.int64) * classes + np.asarray(predictions, dtype=np.int64)
    counts: Ints = np.bincount(cells, minlength=classes**2).astype(np.int64)
    return counts.reshape(classes, classes)


# How evenly something is spread over clients


def gini(values: ArrayLike) -> float:
    """Gini coefficient of numbers >= 0: 0 = all equal, (K - 1) / K = one client has everything.

    The mean absolute difference of all K^2 pairs over twice the mean; 0 where all are 0.
    """
    sorted_K = np.sort(np.asarray(values, dtype=np.float64))
    clients, total = len(sorted_K), sorted_K.sum()
    if total == 0:
        return 0.0
    rank_K = 2 * np.arange(1, clients + 1) - clients - 1
    return float((rank_K * sorted_K).sum() / (clients * total))


def jain(values: ArrayLike) -> float:
    """Jain's index (sum x)^2 / (K sum x^2): 1 = all equal, 1 / K = one client has everything.

    Source: Jain, Chiu and Hawe, DEC TR-301, 1984. 1 where all are 0.
    """
    values_K = np.asarray(values, dtype=np.float64)
    squares = float((values_K**2).sum())
    return float(values_K.sum() ** 2 / (len(values_K) * squares)) if squares else 1.0


def mean_of_lowest(values: ArrayLike, share: float = 0.1) -> float:
    """Mean of the lowest `share` of the values, rounded up to whole ones (at least one)."""
    sorted_K = np.sort(np.asarray(values, dtype=np.float64))
    return float(sorted_K[: max(1, math.ceil(round(share * len(sorted_K), 9)))].mean())
