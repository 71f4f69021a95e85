"""What is remembered between two trainings, and for how long."""

from __future__ import annotations

import pytest
import torch

from fedprompt.backbone.memo import Memo


@torch.no_grad()
def asked(memo: Memo, *keys: str, numbers: int = 4) -> list[str]:
    """Ask for some keys, and return those that had to be computed."""
    computed = []

    def compute(key: str) -> dict[str, torch.Tensor]:
        computed.append(key)
        return {"classes": torch.zeros(numbers)}

    for key in keys:
        memo.recall(key, lambda key=key: compute(key))  # type: ignore[misc]
    return computed


def test_a_key_is_computed_once_until_it_is_cleared() -> None:
    memo = Memo()
    assert asked(memo, "a", "b", "a", "b") == ["a", "b"]
    memo.clear()
    assert asked(memo, "a") == ["a"]


def test_the_least_recently_used_makes_room() -> None:
    memo = Memo(max_bytes=2 * 16)
    assert asked(memo, "a", "b", "a", "c") == ["a", "b", "c"]
    assert asked(memo, "a", "c") == []
    assert asked(memo, "b") == ["b"]


def test_too_large_a_result_is_not_held_and_replaces_nothing() -> None:
    memo = Memo(max_bytes=2 * 16)
    asked(memo, "a")
    assert asked(memo, "large", "large", numbers=9) == ["large", "large"]
    assert asked(memo, "a") == []


def test_nothing_is_served_where_gradients_are_needed() -> None:
    with pytest.raises(AssertionError):
        Memo().recall("a", dict)
