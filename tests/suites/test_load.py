"""Suites are checked when they are read, and identified by what decides about results."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from fedprompt.config.shipped import shipped_names
from fedprompt.errors import UserError
from fedprompt.suites.load import load_suite, suite_path
from fedprompt.suites.rows import select_rows
from tests.support.suites import CONTENT, load, scenario, write


@pytest.mark.parametrize("name", shipped_names("suite"))
def test_every_shipped_suite_loads_in_both_variants(name: str) -> None:
    assert re.search(r"-v\d+$", name)
    for quick in (False, True):
        suite = load_suite(suite_path(name), quick=quick)
        assert suite.scenarios
        assert suite.rows


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"scenarois": {}}, "scenarois"),
        ({"rows": "all_metods"}, "all_methods"),
        ({"rows": {"A b": ["method=promptfl"], "A-B": ["method=promptfl"]}}, "A b"),
        ({"search": {"trails": 3}}, "trials"),
        ({"search": {"sampler": "cma"}}, "tpe"),
        ({"search": {"trials": 0}}, "trials"),
        ({"search": {"with": ["data.frist_image=8"]}}, "frist_image"),
        ({"seeds": [1, 1]}, "seeds"),
        ({"space": {"training.lr": [0.1]}}, "training.lr"),
        ({"scenarios": scenario("skew", experiment="benchmrak")}, "benchmark"),
        ({"scenarios": scenario("skew", metric="persnal")}, "personal"),
        ({"scenarios": scenario("skew", metric="bytes")}, "bytes"),
        ({"scenarios": scenario("skew", objective="worst")}, "objective"),
        ({"scenarios": scenario("skew", overrides=["partition.clents=3"])}, "clents"),
        ({"scenarios": scenario("alike", settings_of="skw")}, "skew"),
        ({"scenarios": scenario("skew", settings_of="alike")}, "settings_of"),
        ({"quick": {"rows": ["PromptFl"]}}, None),
    ],
)
def test_a_mistake_is_named(changes: dict[str, Any], named: str | None, tmp_path: Path) -> None:
    path = write(tmp_path, **changes)
    if named is None:
        load_suite(path)
    with pytest.raises(UserError) as error:
        load_suite(path, quick=named is None)
    assert (named or "PromptFL") in str(error.value)


def test_an_unknown_suite_is_named() -> None:
    with pytest.raises(UserError, match="scenes-v1"):
        suite_path("scene-v1")


def test_the_hash_covers_what_decides_about_results_and_no_more(tmp_path: Path) -> None:
    suite = load(tmp_path)
    same = load(tmp_path, title="other", rows={"FedRSCLIP": ["method=fedrsclip"]}, quick=None)
    assert same.hash == suite.hash
    moved = scenario("skew", overrides=["partition.alpha=1", "output.report=true"])
    assert load(tmp_path, scenarios=moved).hash == suite.hash
    for changes in (
        {"seeds": [2]},
        {"common": [*CONTENT["common"], "training.lr=0.1"]},
        {"search": {**CONTENT["search"], "trials": 3}},
        {"scenarios": scenario("skew", metric="worst")},
        {"scenarios": scenario("alike", data="0" * 64)},
    ):
        assert load(tmp_path, **changes).hash != suite.hash


def test_rows_are_selected_by_name_or_method(tmp_path: Path) -> None:
    suite = load(tmp_path, rows="all_methods")
    assert list(select_rows(suite, None)) == list(suite.rows)
    assert list(select_rows(suite, ["fedrsclip", "coop-local-only", "maple"])) == [
        "CoOp, local only", "MaPLe, text shared", "MaPLe, materialised", "FedRSCLIP",
    ]  # fmt: skip
    assert select_rows(load(tmp_path), ["kgcoop"]) == {"kgcoop": ("method=kgcoop",)}
    with pytest.raises(UserError, match="promptfl"):
        select_rows(suite, ["promtfl"])
