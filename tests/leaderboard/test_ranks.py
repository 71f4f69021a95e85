"""Ranks and tests against the example of Demšar (2006) and against results of scikit-posthocs."""

from __future__ import annotations

import numpy as np
import pytest

from fedprompt.leaderboard.ranks import critical_difference, rank

# J. Demšar, Statistical comparisons of classifiers over multiple data sets, JMLR 7, 2006, table 6:
# areas under the curve of C4.5, and of C4.5 with the parameters m, cf, and both, on 14 data sets.
DEMSAR = np.array([
    [.763, .768, .771, .798], [.599, .591, .590, .569], [.954, .971, .968, .967],
    [.628, .661, .654, .657], [.882, .888, .886, .898], [.936, .931, .916, .931],
    [.661, .668, .609, .685], [.583, .583, .563, .625], [.775, .838, .866, .875],
    [1.00, 1.00, 1.00, 1.00], [.940, .962, .965, .962], [.619, .666, .614, .669],
    [.972, .981, .975, .974], [.957, .978, .946, .970],
]).T  # fmt: skip


def test_demsars_example() -> None:
    found = rank(DEMSAR)
    assert found.blocks == 14
    assert found.averages == pytest.approx([3.143, 2.000, 2.893, 1.964], abs=5e-4)
    assert found.critical_difference == pytest.approx(2.569 * (4 * 5 / (6 * 14)) ** 0.5, abs=1e-3)
    # The paper has 9.28, without the correction for its four ties: of all four rows, which counts
    # 4^3 - 4, and three times of two rows.
    assert found.statistic == pytest.approx(9.28 / (1 - (60 + 3 * 6) / (14 * (64 - 4))), abs=0.01)
    assert found.p == pytest.approx(0.0167216, abs=1e-6), "scipy 1.17, through scikit-posthocs"
    assert found.differ
    # The extremes, 3.143 and 1.964, are nearer than the critical difference of 1.25.
    assert found.groups == ((3, 1, 2, 0),)


@pytest.mark.parametrize(("rows", "quantile"), [(2, 1.960), (4, 2.569), (5, 2.728), (10, 3.164)])
def test_nemenyis_quantiles_are_those_of_the_published_table(rows: int, quantile: float) -> None:
    scale = (rows * (rows + 1) / (6 * 20)) ** 0.5
    assert critical_difference(rows, 20) / scale == pytest.approx(quantile, abs=5e-4)


def test_groups_agree_with_pairwise_tests_of_scikit_posthocs() -> None:
    # posthoc_nemenyi_friedman of scikit-posthocs 0.17.1 gives p < 0.05 for the pairs (0, 4) with
    # 0.0444, (0, 5) and (3, 5) only; next is (1, 5) with 0.0603.
    values = [
        [0.81, 0.86, 0.62, 0.03, 0.42, 0.75, 0.65, 0.07, 0.04, 0.19, 0.51, 0.52],
        [0.23, 0.73, 0.62, 0.26, 0.58, 1.1, 0.84, 1.12, 1.04, 0.92, 0.52, 1.08],
        [0.47, 0.33, 0.56, 0.75, 0.96, 1.08, 1.16, 1.24, 0.96, 0.77, 0.55, 1.22],
        [0.68, 0.54, 0.6, 0.84, 1.03, 0.73, 0.74, 0.74, 1.03, 0.48, 0.54, 0.65],
        [0.78, 0.93, 1.29, 1.48, 0.77, 0.91, 1.53, 0.73, 0.84, 0.85, 1.2, 1.2],
        [1.55, 1.18, 1.48, 1.26, 1.48, 1.39, 0.75, 1.06, 1.22, 1.45, 1.41, 1.38],
    ]
    found = rank(values)
    assert found.averages == pytest.approx([5.125, 3.625, 43 / 12, 4.25, 35 / 12, 1.5])
    assert found.p == pytest.approx(8.914092782581213e-05, rel=1e-9)
    assert found.groups == ((5, 4, 2, 1), (4, 2, 1, 3), (2, 1, 3, 0))


def test_no_row_is_alone_in_a_group_and_no_group_is_part_of_another() -> None:
    # Two clusters far apart in 40 blocks, and one row by itself.
    values = np.random.default_rng(0).normal(size=(5, 40)) + np.array([[0], [0], [50], [90], [90]])
    assert [set(group) for group in rank(values).groups] == [{3, 4}, {0, 1}]


def test_equal_sums_in_another_order_are_ties() -> None:
    found = rank([[0.1 + 0.2, 0.5], [0.3, 0.4], [0.2, 0.3]])
    assert found.averages == (1.25, 1.75, 3.0)


def test_rows_that_are_all_equal_do_not_differ() -> None:
    found = rank([[0.5, 0.5, 0.6]] * 3)
    assert (found.statistic, found.p, found.groups) == (0.0, 1.0, ((0, 1, 2),))


@pytest.mark.parametrize("values", [[[0.5], [0.6], [0.7]], [[0.5, 0.6], [0.7, 0.5]], [[0.5, 0.6]]])
def test_too_few_rows_or_blocks_have_ranks_and_no_test(values: list[list[float]]) -> None:
    found = rank(values)
    assert len(found.averages) == len(values)
    assert found.p is found.critical_difference is None
    assert not found.differ
    assert found.groups == ()
