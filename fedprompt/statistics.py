"""The standard deviation that every result is reported with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


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
