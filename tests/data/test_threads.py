"""Work in threads: in order, bounded, and ended by an error."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from fedprompt.data.threads import in_threads


def test_results_are_in_order_and_few_are_ahead() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for item in range(1000):
            taken += 1
            yield item

    for i, result in enumerate(in_threads(lambda item: item * item, items(), ahead=7)):
        assert result == i * i
        assert taken <= i + 8
    assert taken == 1000


def test_an_error_is_raised_in_its_place_and_ends_the_work() -> None:
    done: list[int] = []
    lock = threading.Lock()

    def work(item: int) -> int:
        if item == 5:
            raise ValueError("five")
        with lock:
            done.append(item)
        return item

    results = in_threads(work, range(10**9), ahead=4)
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="five"):
        next(results)
    assert max(done) < 12
