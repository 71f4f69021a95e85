"""Every method says where `fedprompt tune` looks, and its own settings lie in there."""

from __future__ import annotations

import dataclasses

import pytest

from fedprompt.config.search import Range
from fedprompt.methods.registry import all_methods


@pytest.mark.parametrize("name", sorted(all_methods()))
def test_the_papers_values_are_in_the_space(name: str) -> None:
    method = all_methods()[name]
    config = method.Config()
    # Only these two train nothing at their default settings.
    assert (config.lr_space is None) == (name in ("zero_shot", "tip_adapter"))
    assert config.lr_space is None or 0.002 in config.lr_space
    for field in dataclasses.fields(config):
        space, limits = field.metadata.get("search"), field.metadata
        if space is None:
            continue
        assert getattr(config, field.name) in space
        if isinstance(space, Range):
            # Every value of the space is one that the option accepts.
            assert space.low < space.high
            for at in (space.low, space.high):
                assert limits["gt"] is None or at > limits["gt"]
                assert limits["ge"] is None or at >= limits["ge"]
                assert limits["lt"] is None or at < limits["lt"]
                assert limits["le"] is None or at <= limits["le"]


def test_weights_of_losses_are_searched() -> None:
    fields = {
        f.name: f.metadata.get("search")
        for f in dataclasses.fields(all_methods()["fedrsclip"].Config)
    }
    assert {name for name, space in fields.items() if space} == {
        "theta",
        "dpa_weight",
        "cmfa_weight",
    }
