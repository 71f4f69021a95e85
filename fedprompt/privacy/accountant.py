"""Epsilon of the Gaussian mechanism over rounds, by Renyi differential privacy.

The accountant is that of Google's dp-accounting (extra `dp`), which Flower uses as well. It runs on
the server, which reports epsilon in every round's line in `metrics.jsonl`, and on nodes, for their
privacy ledger.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from fedprompt.errors import UserError

MOST_NOISE = 1e6
"""A release with more noise counts as one with so much, since the accountant squares the noise, and
the square of 1e200 is no float. Epsilon can only be overstated in this way."""
SAMPLED_ORDERS = (*range(2, 64), 80, 96, 128, 192, 256, 512, 1024)
"""Renyi orders for sampled releases. Between 1 and 2 the series for them does not converge, and
those that are not whole take long."""


def epsilon(noise: float, releases: int, delta: float) -> float | None:
    """Epsilon of a number of Gaussian releases.

    No amplification by sampling is claimed: the run's seed determines who takes part, and it is not
    secret.

    Args:
        noise: noise multiplier, the standard deviation divided by the sensitivity.
        releases: number of releases that concern one client.
        delta: the delta that epsilon is given for.

    Returns:
        Epsilon, or None if it is infinite because there is no noise.

    Raises:
        UserError: the accountant is not installed.
    """
    return composed_epsilon({noise: releases}, delta)


def composed_epsilon(releases: Mapping[float, int], delta: float) -> float | None:
    """Epsilon of Gaussian releases with several noise multipliers, all about the same data.

    Args:
        releases: number of releases by noise multiplier.
        delta: the delta that epsilon is given for.

    Returns:
        Epsilon, or None if it is infinite because a release has no noise.

    Raises:
        UserError: the accountant is not installed.
    """
    return sampled_epsilon({(noise, 1): count for noise, count in releases.items()}, delta)


def sampled_epsilon(releases: Mapping[tuple[float, int], int], delta: float) -> float | None:
    """Epsilon of Gaussian releases about a random part of the same data, by Poisson sampling.

    Args:
        releases: number of releases by noise multiplier and m, where each record is in a release
            with probability 1 / m, independently and in secret; m = 1 stands for all of them.
        delta: the delta that epsilon is given for.

    Returns:
        Epsilon, or None if it is infinite because a release has no noise.

    Raises:
        UserError: the accountant is not installed.
    """
    if any(noise == 0 for noise, _ in releases):
        return None
    counted: Counter[tuple[float, int]] = Counter()
    for (noise, m), count in releases.items():
        if count:
            counted[min(noise, MOST_NOISE), m] += count
    try:
        from dp_accounting import dp_event
        from dp_accounting.rdp import RdpAccountant
    except ImportError:
        raise UserError(
            "differential privacy needs its accountant: pip install 'fedprompt[dp]'."
        ) from None
    accountant = RdpAccountant(SAMPLED_ORDERS if any(m > 1 for _, m in counted) else None)
    for (noise, m), count in sorted(counted.items()):
        event = dp_event.GaussianDpEvent(noise)
        accountant.compose(event if m == 1 else dp_event.PoissonSampledDpEvent(1 / m, event), count)
    # Before the first release nothing has been revealed.
    return float(accountant.get_epsilon(delta)) if counted else 0.0
