"""Epsilon of the Gaussian mechanism over rounds."""

from __future__ import annotations

from flwr.serverapp import GaussianPrivacyEvent, NeighboringRelation, PrivacyConfig, SamplingMethod

from fedprompt.errors import UserError


def epsilon(noise: float, releases: int, delta: float) -> float | None:
    """Epsilon of `releases` Gaussian releases with noise multiplier `noise`; None = infinite.

    Raises:
        UserError: the accountant is not installed.
    """
    if noise == 0:
        return None
    try:
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
    return accountant.get_epsilon(delta) if releases else 0.0
