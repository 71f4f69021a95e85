"""Epsilon of the Gaussian mechanism over rounds, by Renyi differential privacy.

The accountant is Flower's `RdpAccountant`, which uses Google's dp-accounting (extra `dp`). It runs
on the server, which reports epsilon in every round's line in `metrics.jsonl`.
"""

from __future__ import annotations

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
    if noise == 0:
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
    if releases:
        event = GaussianPrivacyEvent(noise, sample_size=1, population_size=1)
        accountant.compose(event, releases)
    # Before the first release nothing has been revealed.
    return accountant.get_epsilon(delta) if releases else 0.0
