"""The metrics that papers report, as plain functions of arrays.

Evaluation protocols call them, most of them on the server after the last round. Where scikit-learn
has the same metric, both give the same numbers; tests compare them.

Shape suffixes: N images, K clients, C classes, M bins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedprompt.statistics import average_precision as area_under_steps

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def harmonic_mean(a: float, b: float) -> float:
    """The harmonic mean 2ab / (a + b) of two numbers >= 0; it is 0 if one of them is 0."""
    return 2 * a * b / (a + b) if a > 0 and b > 0 else 0.0


# Detection: images of known classes should have higher scores than all other images.


def auroc(known: ArrayLike, other: ArrayLike) -> float:
    """Area under the ROC: the probability that a known image scores higher than another one.

    Args:
        known: scores of images of known classes (N,), the positives.
        other: scores of all other images (N,).

    Returns:
        A fraction in [0, 1]; ties count one half.

    Raises:
        ValueError: the scores are empty, not one-dimensional, or contain NaN.
    """
    # Ranks instead of all pairs: O(N log N), and no array of N x N comparisons.
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
        The fraction of the other images that are accepted as well.

    Raises:
        ValueError: the scores are empty, not one-dimensional, or contain NaN.
    """
    known_N, other_N = np.sort(_scores(known)), _scores(other)
    # Rounding before `ceil` keeps float noise from turning 0.95 x 20 = 19 images into 20.
    accepted = max(1, math.ceil(round(tpr * len(known_N), 9)))
    return float((other_N >= known_N[-accepted]).mean())


def tpr_at_fpr(known: ArrayLike, other: ArrayLike, fpr: float = 0.01) -> float:
    """True positive rate at the lowest threshold with a false positive rate of at most `fpr`.

    Args:
        known: scores of the positives (N,).
        other: scores of all others (N,).
        fpr: fraction of the others that may be accepted. With fewer than 1 / fpr of them, it is
            none.

    Returns:
        The fraction of the positives whose score exceeds the threshold.

    Raises:
        ValueError: the scores are empty, not one-dimensional, or contain NaN.
    """
    known_N, other_N = _scores(known), np.sort(_scores(other))[::-1]
    # As many of the others may lie above the threshold; equal scores are on the same side.
    allowed = min(math.floor(round(fpr * len(other_N), 9)), len(other_N) - 1)
    return float((known_N > other_N[allowed]).mean())


def average_precision(known: ArrayLike, other: ArrayLike) -> float:
    """Area under the precision-recall curve, as a sum of steps without interpolation.

    Args:
        known: scores of images of known classes (N,), the positives.
        other: scores of all other images (N,). Images with equal scores form one step.

    Returns:
        A fraction in (0, 1].

    Raises:
        ValueError: the scores are empty, not one-dimensional, or contain NaN.
    """
    return area_under_steps(_scores(known), _scores(other))


def _scores(values: ArrayLike) -> Floats:
    scores_N = np.asarray(values, dtype=np.float64)
    if scores_N.ndim != 1 or not len(scores_N) or np.isnan(scores_N).any():
        raise ValueError("scores must be a non-empty row of numbers")
    return scores_N


# Calibration


@dataclass(frozen=True)
class Reliability:
    """Sums over images in M confidence bins of equal width.

    Bin m, counted from 1, holds confidences in ((m - 1) / M, m / M]. The first bin also holds 0.
    The class stores sums instead of means, so that clients can be pooled by adding their sums.

    Attributes:
        count_M: images per bin.
        confidence_M: sum of their confidences.
        correct_M: number of correctly classified images per bin.
    """

    count_M: Ints
    confidence_M: Floats
    correct_M: Ints

    @classmethod
    def of(cls, confidence: ArrayLike, correct: ArrayLike, bins: int) -> Reliability:
        """Sort images into bins.

        Args:
            confidence: confidence of every prediction (N,), in [0, 1].
            correct: whether each prediction is correct (N,).
            bins: number of bins M.

        Returns:
            The sums over these images; N may be 0.
        """
        confidence_N = np.asarray(confidence, dtype=np.float64)
        correct_N = np.asarray(correct, dtype=np.int64)
        # Without the outer edges, 0 falls into the first bin and 1 into the last one.
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
        """Mean confidence minus accuracy of each bin; 0 for an empty bin."""
        return (self.confidence_M - self.correct_M) / np.maximum(self.count_M, 1)

    @property
    def expected_error(self) -> float:
        """ECE: the mean absolute gap, weighted by images (Guo et al., ICML 2017)."""
        total = self.count_M.sum()
        return float((np.abs(self.gaps_M) * self.count_M).sum() / total) if total else 0.0

    @property
    def maximum_error(self) -> float:
        """MCE: the largest absolute gap of any bin that has images."""
        return float(np.abs(self.gaps_M).max())

    def to_json(self) -> dict[str, Any]:
        """ECE, MCE, and per bin the count, mean confidence and accuracy (None if it is empty)."""

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
    """Count images by true and by predicted class.

    Args:
        labels: true classes (N,).
        predictions: predicted classes (N,).
        classes: number of classes C.

    Returns:
        The confusion matrix (C, C): true classes are rows, predicted classes are columns.
    """
    cells = np.asarray(labels, dtype=np.int64) * classes + np.asarray(predictions, dtype=np.int64)
    counts: Ints = np.bincount(cells, minlength=classes**2).astype(np.int64)
    return counts.reshape(classes, classes)


# Fairness: how evenly a quantity is spread over clients


def gini(values: ArrayLike) -> float:
    """Gini coefficient: 0 if all values are equal, (K - 1) / K if one client has everything.

    It is the mean absolute difference over all K^2 pairs, divided by twice the mean.

    Args:
        values: one number >= 0 per client (K,).

    Returns:
        The coefficient; 0 if all values are 0.
    """
    sorted_K = np.sort(np.asarray(values, dtype=np.float64))
    clients, total = len(sorted_K), sorted_K.sum()
    if total == 0:
        return 0.0
    # The sum over pairs is a weighted sum of the sorted values, without K^2 differences.
    rank_K = 2 * np.arange(1, clients + 1) - clients - 1
    return float((rank_K * sorted_K).sum() / (clients * total))


def jain(values: ArrayLike) -> float:
    """Jain's index (sum x)^2 / (K sum x^2): 1 if all are equal, 1 / K if one has everything.

    Source: Jain, Chiu and Hawe, DEC TR-301, 1984.

    Args:
        values: one number >= 0 per client (K,).

    Returns:
        The index; 1 if all values are 0.
    """
    values_K = np.asarray(values, dtype=np.float64)
    squares = float((values_K**2).sum())
    return float(values_K.sum() ** 2 / (len(values_K) * squares)) if squares else 1.0


def mean_of_lowest(values: ArrayLike, share: float = 0.1) -> float:
    """Mean of the lowest values.

    Args:
        values: one number per client (K,).
        share: the fraction of clients to average over; their number is rounded up, to at least 1.

    Returns:
        The mean of these values.
    """
    sorted_K = np.sort(np.asarray(values, dtype=np.float64))
    return float(sorted_K[: max(1, math.ceil(round(share * len(sorted_K), 9)))].mean())
