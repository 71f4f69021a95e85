"""A nested container: each tensor is found in its part by the table, and nothing is guessed."""

from __future__ import annotations

import pytest
import torch

from fedprompt.methods.parts.nested import Layout

LAYOUT = (
    Layout().with_part("base", ["ctx", "control.extra"]).with_part("control", ["ctx"], "control.")
)


def test_nesting_is_undone_by_flattening() -> None:
    flat = {n: torch.full((1,), float(i)) for i, n in enumerate(("ctx", "control.ctx"))}
    nested = LAYOUT.nest(flat)
    assert nested == {"base": {"ctx": flat["ctx"]}, "control": {"ctx": flat["control.ctx"]}}
    assert LAYOUT.flatten(nested) == flat


def test_a_name_that_begins_like_another_part_stays_in_its_own() -> None:
    flat = {"control.extra": torch.zeros(1)}
    assert LAYOUT.nest(flat) == {"base": flat, "control": {}}


def test_unknown_and_ambiguous_names_are_refused() -> None:
    with pytest.raises(KeyError, match=r"control\.b"):
        LAYOUT.nest({"control.b": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"control\.ctx"):
        Layout().with_part("base", ["control.ctx"]).with_part("control", ["ctx"], "control.")
