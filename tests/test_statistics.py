"""The one standard deviation of all results: that of a sample."""

from __future__ import annotations

import math

import pytest

from fedprompt.federation.scores import personal_part
from fedprompt.reports.compare.statistics import Cell
from fedprompt.statistics import sample_std


def test_the_divisor_is_one_less_than_the_number_of_values() -> None:
    assert sample_std([1.0, 3.0]) == math.sqrt(2)
    assert Cell({1: 1.0, 2: 3.0}).std == math.sqrt(2)
    part = personal_part([0, 4], [0.25, 0.75])
    assert part is not None
    assert part["std"] == pytest.approx(0.5 / math.sqrt(2))


def test_the_spread_of_one_value_is_unknown() -> None:
    assert sample_std([0.5]) is None
    assert Cell({1: 0.5}).std is None
    part = personal_part([3], [0.5])
    assert part is not None
    assert part["std"] is None
