"""Protocols by name: their options in a config, what they hold out, and what each must offer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedprompt.config.schema import to_dict
from fedprompt.errors import UserError
from fedprompt.evaluation.protocol import Protocol
from fedprompt.evaluation.registry import (
    DEFAULT,
    all_protocols,
    compare_runs,
    open_protocols,
    result_tables,
    who_holds_out,
)
from fedprompt.experiment.compose import compose
from fedprompt.experiment.validate import validate
from fedprompt.reports.format import Table
from fedprompt.reports.run_data import load_run
from tests.support import ROOT
from tests.support.builders import small_config
from tests.support.protocol_runs import (
    TARGETS,
    TOGETHER,
    config_of,
)


def test_default_protocols_and_round_trip() -> None:
    plain = compose("quickstart")
    assert plain.protocols == ["global", "personalised"]
    chosen = config_of(*TOGETHER)
    assert validate(to_dict(chosen)) == chosen
    targets = chosen.protocol_options["cross_data_set"].targets
    assert targets[0]["source"] == "aerial_scenes", "complete: no name is left to look up"
    assert validate(to_dict(chosen)).protocol_options["cross_data_set"].targets == targets


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        ({"protocols": ["globl"]}, "no protocol 'globl'. Did you mean 'global'"),
        ({"protocols": "global"}, "must be a list of names"),
        ({"protocols": []}, "protocols is empty"),
        ({"protocols": ["global", "global"]}, "twice"),
        ({"protocol_options": {"x": {}}}, "no protocol 'x'"),
        ({"protocol_options": 3}, "a key per protocol"),
        ({"protocol_options": {"ood": 3}}, "protocol_options.ood is 3"),
        ({"protocol_options": {"ood": {"locl": 1}}}, "Did you mean 'local'"),
        ({"protocol_options": {"calibration": {"bins": 0}}}, "bins is 0; it must be at least 1"),
        ({"protocol_options": {"communication": {"percents": [101]}}}, "at most 100"),
        ({"protocol_options": {"cross_data_set": {"targets": ["nowhere"]}}}, "no data 'nowhere'"),
        ({"protocol_options": {"cross_data_set": {"targets": 3}}}, "must be a list of data sets"),
        (
            {"protocol_options": {"ood": {"out": ["aerial_scenes", "aerial_scenes"]}}},
            "two data sets are called 'aerial_scenes'",
        ),
        ({"protocols": ["global", "fairness"]}, "'fairness' reads the results of personalised"),
        (
            {"protocols": ["base_to_new", "leave_one_domain_out"]},
            "'base_to_new' and 'leave_one_domain_out' both hold something out",
        ),
        ({"protocols": ["ood", "leave_one_domain_out"]}, "both hold something out"),
    ],
)
def test_impossible_configs_are_one_line(raw: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        small_config(**raw)


def test_who_holds_out() -> None:
    def holder(*names: str, **options: Any) -> str | None:
        raw = {"protocols": list(names), "protocol_options": options}
        found = who_holds_out(open_protocols(small_config(**raw)))
        return None if found is None else found.name

    assert holder("global") is None
    assert holder("ood") == "ood"
    # The new classes serve as unknown ones, whatever the order.
    assert holder("ood", "base_to_new") == holder("base_to_new", "ood") == "base_to_new"
    assert holder("ood", "leave_one_domain_out", ood={"out": TARGETS}) == "leave_one_domain_out"
    assert holder("ood", ood={"out": TARGETS}) is None


@pytest.mark.parametrize("name", sorted(all_protocols()))
def test_every_protocol_says_what_it_is(name: str) -> None:
    cls = all_protocols()[name]
    assert cls.title
    assert cls.__doc__
    if name not in DEFAULT:
        assert cls.caption
        assert {"measure", "table", "figure"} <= set(vars(cls))
    options = cls.prepare({})
    assert cls.prepare(options) == options


def test_every_shipped_experiment_and_sweep_of_a_protocol_composes() -> None:
    folder = ROOT / "configs"
    found = sorted(p.stem for p in (folder / "experiment").glob("protocol_*.yaml"))
    covered = {name for stem in found for name in compose(stem).protocols}
    assert covered == set(all_protocols())


def test_protocols_that_cannot_be_compared_say_which_can(runs: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"these have: .*few_shot, .*leave_one_domain_out"):
        compare_runs("ood", [load_run(runs("ood"))])


def test_tables_of_transductive_results_say_so() -> None:
    transductive = {name for name, cls in all_protocols().items() if cls.transductive}
    assert transductive == {"at_test_time", "prompt_choice"}
    (table,) = result_tables({"protocols": {"prompt_choice": {"rows": []}}}, "here")
    assert table.title.endswith("(transductive)")


def test_markdown_escapes_the_column_separator() -> None:
    table = Table("t", ("a", "b"), (("x|y", "1"),))
    assert table.markdown() == "| a | b |\n| --- | --- |\n| x/y | 1 |"
    assert issubclass(all_protocols()["ood"], Protocol)
