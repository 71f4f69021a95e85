"""The updates of a round as rows of a matrix."""

from __future__ import annotations

import numpy as np
import pytest

from fedprompt.messages import Arrays, Update
from fedprompt.strategies.parts.vectors import changes, clipped, count_of, moved
from tests.support.strategies import (
    full,
)


def test_changes_and_back() -> None:
    shared: Arrays = {"b": full(1.0), "a": np.array([5.0], np.float32)}
    update = Update(0, {"a": np.array([7.0], np.float32), "b": full(4.0)}, 1)
    rows = changes(shared, [update])
    assert rows.tolist() == [[3.0, 3.0, 3.0, 3.0, 2.0]], "in the order of the shared tensors"
    after = moved(shared, rows[0])
    assert {n: a.tolist() for n, a in after.items()} == {"b": full(4.0).tolist(), "a": [7.0]}


def test_clipping_keeps_directions() -> None:
    rows = clipped(np.array([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]]), 1.0)
    np.testing.assert_allclose(rows, [[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]])


@pytest.mark.parametrize(
    ("share", "clients", "count"), [(0.3, 10, 3), (0.1, 30, 3), (0.29, 100, 29), (0.3, 3, 0)]
)
def test_shares_of_clients(share: float, clients: int, count: int) -> None:
    assert count_of(share, clients) == count
