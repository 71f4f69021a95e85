"""Which files are merged, and which are refused with which reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedprompt.errors import UserError
from fedprompt.leaderboard.collect import Refused, Suite, collect
from fedprompt.suites.result_file import ResultFile, write
from tests.support.result_files import result_file

VALUES = {"label-skew": {1: 0.5, 2: 0.6}, "few-shot": {1: 0.7, 2: 0.8}}
OTHER = "f" * 64


def files(folder: Path, *results: ResultFile) -> list[Path]:
    """Write results as `0.json`, `1.json`, ..."""
    paths = [folder / f"{i}.json" for i in range(len(results))]
    for path, result in zip(paths, results, strict=True):
        write(result, path)
    return paths


def with_scenario(result: ResultFile, name: str, **changes: Any) -> ResultFile:
    """The result with changes in one scenario."""
    scenario = replace(result.scenarios[name], **changes)
    return replace(result, scenarios={**result.scenarios, name: scenario})


def rows(suites: list[Suite]) -> list[list[str]]:
    return [[entry.result.row for entry in suite.entries] for suite in suites]


def reasons(refused: list[Refused]) -> dict[str, str]:
    return {one.path.name: one.reason for one in refused}


def test_files_are_found_in_folders_of_suites_and_anywhere(tmp_path: Path) -> None:
    a, b, c, d = (result_file(name, VALUES) for name in "ABCD")
    write(a, tmp_path / "suite" / "results" / "a.json")
    write(b, tmp_path / "deep" / "er" / "suite" / "results" / "b.json")
    write(c, tmp_path / "c.json")
    write(d, tmp_path / "suite" / "runs" / "summary.json")
    (tmp_path / "suite" / "suite.json").write_text('{"plan": 1}')
    suites, refused = collect([tmp_path, tmp_path / "c.json", tmp_path / "suite"])
    assert rows(suites) == [["C", "B", "A"]], "not D, which is in no folder for results"
    assert refused == []
    assert rows(collect([tmp_path / "suite" / "runs"])[0]) == [["D"]]


def test_suites_are_kept_apart(tmp_path: Path) -> None:
    one, two = result_file("A", VALUES), result_file("A", VALUES, suite="demo-v2")
    suites, refused = collect(files(tmp_path, one, two))
    assert [suite.name for suite in suites] == ["demo-v1", "demo-v2"]
    assert refused == []


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda r: replace(r, suite_hash=OTHER), "suite_hash"),
        (lambda r: replace(r, planned={**r.planned, "few-shot": (1, 2, 3)}), "planned.few-shot"),
        (lambda r: replace(r, planned={**r.planned, "new": (1,)}), "planned"),
        (lambda r: with_scenario(r, "few-shot", data="other"), "scenarios.few-shot.data"),
        (lambda r: with_scenario(r, "few-shot", metric="global"), "scenarios.few-shot.metric"),
        (
            lambda r: with_scenario(
                r, "few-shot", partitions={**r.scenarios["few-shot"].partitions, 2: OTHER}
            ),
            "scenarios.few-shot.partitions.2",
        ),
    ],
)
@pytest.mark.parametrize("place", [0, 2])
def test_what_differs_from_most_files_is_refused(
    tmp_path: Path, change: Any, field: str, place: int
) -> None:
    results = [result_file(name, VALUES) for name in "ABC"]
    results[place] = change(results[place])
    paths = files(tmp_path, *results)
    suites, refused = collect(paths)
    assert rows(suites) == [[r.row for i, r in enumerate(results) if i != place]]
    ((name, reason),) = reasons(refused).items()
    assert name == paths[place].name
    assert f"{paths[place]}: {field} is " in reason


def test_of_two_that_differ_the_second_is_refused(tmp_path: Path) -> None:
    paths = files(tmp_path, result_file("A", VALUES), result_file("B", VALUES, suite_hash=OTHER))
    assert rows(collect(paths)[0]) == [["A"]]
    assert rows(collect(paths[::-1])[0]) == [["B"]]


def test_equal_numbers_are_a_copy_even_from_another_machine(tmp_path: Path) -> None:
    result = result_file("A", VALUES)
    paths = files(tmp_path, result, replace(result, machine={"cpu": "two"}, versions={}))
    suites, refused = collect(paths)
    (entry,) = suites[0].entries
    assert (entry.path, entry.copies) == (paths[0], (paths[1],))
    assert refused == []


def test_an_earlier_copy_gives_way_to_the_whole_file(tmp_path: Path) -> None:
    whole = result_file("A", VALUES)
    part = replace(whole, scenarios={"few-shot": whole.scenarios["few-shot"]})
    paths = files(tmp_path, part, whole)
    (entry,) = collect(paths)[0][0].entries
    assert (entry.path, entry.copies) == (paths[1], (paths[0],))


@pytest.mark.parametrize("order", [1, -1])
def test_two_results_of_a_row_are_both_refused(tmp_path: Path, order: int) -> None:
    other = {**VALUES, "few-shot": {1: 0.7, 2: 0.81}}
    paths = files(
        tmp_path, result_file("A", VALUES), result_file("A", other), result_file("B", VALUES)
    )
    suites, refused = collect(paths[::order])
    assert rows(suites) == [["B"]]
    assert set(reasons(refused)) == {"0.json", "1.json"}
    for reason in reasons(refused).values():
        assert "scenarios.few-shot.default.seeds.2" in reason
        assert str(paths[0]) in reason
        assert str(paths[1]) in reason


def test_two_halves_of_a_row_are_not_put_together(tmp_path: Path) -> None:
    whole = result_file("A", VALUES)
    halves = [replace(whole, scenarios={name: whole.scenarios[name]}) for name in VALUES]
    suites, refused = collect(files(tmp_path, *halves))
    assert suites == []
    assert len(refused) == 2


def test_an_edited_file_does_not_stop_the_others(tmp_path: Path) -> None:
    paths = files(tmp_path, result_file("A", VALUES), result_file("B", VALUES))
    paths[0].write_text(paths[0].read_text().replace("0.5", "0.9", 1))
    suites, refused = collect([tmp_path])
    assert rows(suites) == [["B"]]
    assert "checksum" in reasons(refused)["0.json"]


def test_a_named_file_that_is_no_result_is_refused(tmp_path: Path) -> None:
    (path,) = files(tmp_path, result_file("A", VALUES))
    other = tmp_path / "other.json"
    other.write_text("{}")
    assert list(reasons(collect([path, other])[1])) == ["other.json"]
    assert collect([tmp_path])[1] == [], "a folder may hold any other files"


def test_paths_without_results_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=str(tmp_path)):
        collect([tmp_path])
    with pytest.raises(UserError, match=r"none\.json"):
        collect([*files(tmp_path, result_file("A", VALUES)), tmp_path / "none.json"])
