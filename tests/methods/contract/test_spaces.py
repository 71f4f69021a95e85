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
    # Only these train nothing at their default settings.
    untrained = ("afl", "latte", "tfup", "tip_adapter", "tofa", "zero_shot")
    assert (config.lr_space is None) == (name in untrained)
    assert config.lr_space is None or 0.002 in config.lr_space
    searched = config.search_spaces
    for field in dataclasses.fields(config):
        space, limits = searched.get(field.name), field.metadata
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
    config = all_methods()["fedrsclip"].Config()
    assert {*config.search_spaces} == {"theta", "dpa_weight", "cmfa_weight"}


@pytest.mark.parametrize("name", ["fedprox", "scaffold", "ditto", "fedper", "rebapl"])
def test_a_wrapper_searches_the_options_of_its_base(name: str) -> None:
    wrapper, base = (all_methods()[n].Config for n in (name, "prograd"))
    of_base = {f"options.{key}": space for key, space in base().search_spaces.items()}
    assert of_base
    assert wrapper(base="prograd").search_spaces == wrapper().search_spaces | of_base
    assert wrapper(base="tip_adapter", options={"fine_tune": True}).lr_space is not None
