"""Robust strategies, against numbers worked out by hand, slow twins and Flower."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import (
    ArrayRecord,
    RecordDict,
)
from flwr.serverapp.strategy.fedtrimmedavg import trim_mean
from flwr.serverapp.strategy.multikrum import select_multikrum

from fedprompt.messages import to_array
from fedprompt.strategies.parts.robust import mixed
from tests.support.strategies import (
    Rows,
    make_strategy,
    random_rows,
    step,
)


def test_trimmed_mean_by_hand_and_flowers() -> None:
    rows = [[1.0], [2.0], [3.0], [4.0], [100.0]]
    assert step(make_strategy("trimmed_mean", (1,), attackers=0.2), rows).tolist() == [3.0]
    assert step(make_strategy("trimmed_mean", (1,), attackers=0.4), rows).tolist() == [3.0]
    assert step(make_strategy("trimmed_mean", (1,), attackers=0.0), rows).tolist() == [22.0]
    many = random_rows()
    ours = step(make_strategy("trimmed_mean", (6,), attackers=0.3), many)
    np.testing.assert_allclose(ours, trim_mean(many.astype(np.float32), 0.3), rtol=1e-5, atol=1e-6)


def test_median_by_hand() -> None:
    rows = [[1.0, 9.0], [2.0, 8.0], [1e3, -1e3]]
    assert step(make_strategy("median", (2,)), rows).tolist() == [2.0, 8.0]
    assert step(make_strategy("median", (2,)), rows[:2]).tolist() == [1.5, 8.5]


def krum_by_loops(rows: Rows, attackers: int, keep: int) -> set[int]:
    """The paper's definition, one distance at a time."""
    scores = []
    for i, own in enumerate(rows):
        distances = sorted(
            sum((a - b) ** 2 for a, b in zip(own, other, strict=True))
            for j, other in enumerate(rows)
            if j != i
        )
        scores.append(sum(distances[: len(rows) - attackers - 2]))
    return set(sorted(range(len(rows)), key=lambda i: scores[i])[:keep])


@pytest.mark.parametrize("seed", range(5))
def test_krum_is_the_papers_and_flowers(seed: int) -> None:
    rows = random_rows(seed=seed)
    (best,) = krum_by_loops(rows, 3, 1)
    np.testing.assert_allclose(step(make_strategy("krum", (6,)), rows), rows[best], rtol=1e-6)
    kept = sorted(krum_by_loops(rows, 3, 7))
    ours = step(make_strategy("multi_krum", (6,)), rows)
    np.testing.assert_allclose(ours, rows[kept].mean(axis=0), rtol=1e-5, atol=1e-7)
    records = [
        RecordDict({"a": ArrayRecord({"ctx": to_array(r.astype(np.float32))})}) for r in rows
    ]
    theirs = select_multikrum(records, num_malicious_nodes=3, num_nodes_to_select=7)
    assert {records.index(r) for r in theirs} == set(kept)


def test_krum_sees_small_changes_of_large_prompts() -> None:
    # Between whole prompts of norm 1e4 in float32 these distances would all be rounding.
    start = np.full(6, 4096.0)
    rows = random_rows() * 0.01
    (best,) = krum_by_loops(((start + rows).astype(np.float32) - start), 3, 1)
    after = step(make_strategy("krum", (6,)), start + rows, start=start)
    assert after.tolist() == (start + rows).astype(np.float32)[best].tolist()


@pytest.mark.parametrize("name", ["trimmed_mean", "median", "krum", "multi_krum"])
def test_three_of_ten_attackers_do_no_harm(name: str) -> None:
    draw = np.random.default_rng(1)
    honest = 1 + 0.1 * draw.standard_normal((7, 50))
    for attack in (-10 * np.ones((3, 50)), 1e3 * draw.standard_normal((3, 50)), np.zeros((3, 50))):
        rows = np.concatenate([attack, honest])
        after = step(make_strategy(name, (50,)), rows)
        assert np.abs(after - 1).max() < 0.35
        assert np.abs(step(make_strategy("fedavg", (50,)), rows) - 1).max() > 0.29


def test_mixing_by_hand() -> None:
    # Nearest two of three: {0, 1}, {0, 1}, {2, 1}.
    rows = np.array([[0.0], [1.0], [10.0]])
    assert mixed(rows, 1).tolist() == [[0.5], [0.5], [5.5]]
    assert mixed(rows, 0).tolist() == [[11 / 3]] * 3
    assert step(make_strategy("median", (1,), attackers=0.34, mix=True), rows).tolist() == [0.5]


@pytest.mark.parametrize("name", ["trimmed_mean", "median", "krum", "multi_krum"])
def test_mixing_leaves_far_attackers_out_of_very_different_clients(name: str) -> None:
    draw = np.random.default_rng(3)
    honest = 0.3 + draw.standard_normal((7, 400))
    rows = np.concatenate([honest, -5 * honest[:3]])
    error = [
        float(np.linalg.norm(step(make_strategy(name, (400,), mix=mix), rows) - honest.mean(0)))
        for mix in (True, False)
    ]
    assert error[0] < 1e-4, "what is left is the mean of the honest clients"
    assert name == "multi_krum" or error[1] > 1.0, "the plain rules do worse here"


def test_norm_clipping_by_hand() -> None:
    rows = [[3.0, 4.0], [0.0, 1.0], [0.0, -60.0]]
    expected = [0.6 / 3, (0.8 + 1 - 1) / 3]
    after = step(make_strategy("norm_clipping", (2,), bound=1.0), rows)
    np.testing.assert_allclose(after, expected, rtol=1e-6)
    median = step(make_strategy("norm_clipping", (2,)), rows)
    np.testing.assert_allclose(median, [1.0, (4 + 1 - 5) / 3], rtol=1e-6, atol=1e-7)
    wide = make_strategy("norm_clipping", (2,), bound=1e9, weights="samples")
    fedavg = step(make_strategy("fedavg", (2,)), rows, images=[1, 2, 3])
    np.testing.assert_allclose(step(wide, rows, images=[1, 2, 3]), fedavg, rtol=1e-6)
