"""Epsilon of the Gaussian mechanism, against the exact value."""

from __future__ import annotations

import math

import pytest

from fedprompt.privacy.accountant import epsilon


def test_epsilon_is_that_of_composed_gaussians() -> None:
    pytest.importorskip("dp_accounting", reason="needs the extra 'dp'")
    from scipy.optimize import brentq
    from scipy.stats import norm

    for noise, rounds in ((1.0, 1), (5.0, 30), (10.0, 30)):
        mu = math.sqrt(rounds) / noise

        def excess(e: float, mu: float = mu) -> float:
            """Balle and Wang (ICML 2018, arXiv 1805.06530), theorem 8, minus delta."""
            return float(
                norm.cdf(mu / 2 - e / mu) - math.exp(e) * norm.cdf(-mu / 2 - e / mu) - 1e-5
            )

        exact = brentq(excess, 0, 100)
        ours = epsilon(noise, rounds, 1e-5)
        assert ours is not None
        assert exact <= ours <= 1.1 * exact, "a bound, and not a loose one"
    assert epsilon(1.0, 0, 1e-5) == 0.0
    assert epsilon(0.0, 3, 1e-5) is None
    # The square of so much noise is no float.
    assert epsilon(1e300, 3, 1e-5) == epsilon(1e6, 3, 1e-5)
