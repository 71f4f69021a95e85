from __future__ import annotations

import pytest

from fedprompt.bench.growth import fit


@pytest.mark.parametrize("exponent", [0, 1, 1.5, 2])
def test_a_power_is_found_exactly(exponent: float) -> None:
    law = fit([10, 100, 1000], [3 * n**exponent for n in (10, 100, 1000)])
    assert law is not None
    assert law.exponent == pytest.approx(exponent)
    assert law.residual == pytest.approx(0, abs=1e-9)
    assert law.points == 3


def test_what_is_no_power_has_a_residual() -> None:
    """By hand: log10 of 1, 1, 100 at 1, 10, 100 is 0, 0, 2; the line through them is x - 1/3."""
    law = fit([1, 10, 100], [1, 1, 100])
    assert law is not None
    assert law.exponent == pytest.approx(1)
    # Deviations 1/3, -2/3 and 1/3: their root mean square is sqrt(2) / 3.
    assert law.residual == pytest.approx(10 ** (2**0.5 / 3) - 1)


def test_no_cost_has_no_law() -> None:
    assert fit([1, 10], [0, 5]) is None
