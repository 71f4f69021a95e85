"""Epsilon of the Gaussian mechanism over rounds, by Renyi differential privacy.

The accountant is Flower's `RdpAccountant`, which uses Google's dp-accounting (extra `dp`). It runs
on the server, which reports epsilon in every round's line in `metrics.jsonl`.
"""

from __future__ import annotations

from collections.abc import Mapping

from flwr.serverapp import GaussianPrivacyEvent, NeighboringRelation, PrivacyConfig, SamplingMethod

from fedprompt.errors import UserError


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
    if 0 in releases:
        return None
    try:
        # Flower imports dp-accounting when this name is first used.
        from flwr.serverapp import RdpAccountant

        accountant = RdpAccountant(
            PrivacyConfig(
                target_delta=delta,
                population_size=1,
                neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
                sampling_method=SamplingMethod.NO_AMPLIFICATION,
            )
        )
    except ImportError:
        raise UserError(
            "differential privacy needs its accountant: pip install 'fedprompt[dp]'."
        ) from None
    counted = {noise: count for noise, count in releases.items() if count}
    for noise, count in sorted(counted.items()):
        accountant.compose(GaussianPrivacyEvent(noise, sample_size=1, population_size=1), count)
    # Before the first release nothing has been revealed.
    return accountant.get_epsilon(delta) if counted else 0.0
