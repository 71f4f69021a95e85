"""Result files: what is written is read again, and everything else is refused with its field."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedprompt.errors import DamagedFile, UserError
from fedprompt.suites.result_file import SCHEMA, ResultFile, checksum, read, write
from tests.support.result_files import result_file, seed_result

SEEDS = {1: 0.5, 2: 0.625}
RESULT = result_file(
    "FedRSCLIP", {"label-skew": SEEDS, "few-shot": SEEDS}, {"label-skew": SEEDS, "few-shot": SEEDS}
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A written result file."""
    path = tmp_path / "results" / "fedrsclip.json"
    write(RESULT, path)
    return path


def edit(path: Path, change: Callable[[Any], object], *, signed: bool = True) -> None:
    """Change the JSON of a file, and its checksum if it is `signed`."""
    content = json.loads(path.read_text())
    change(content)
    if signed:
        content["checksum"] = checksum(content)
    path.write_text(json.dumps(content))


def put(keys: str, value: Any) -> Callable[[Any], object]:
    """A change of the field with this path; its parts are separated by slashes."""
    *parents, last = keys.split("/")

    def change(content: Any) -> None:
        for key in parents:
            content = content[key]
        content[last] = value

    return change


def drop(keys: str) -> Callable[[Any], object]:
    """Removal of the field with this path."""
    *parents, last = keys.split("/")

    def change(content: Any) -> None:
        for key in parents:
            content = content[key]
        del content[last]

    return change


def test_reads_what_was_written(path: Path) -> None:
    assert read(path) == RESULT
    first = path.read_bytes()
    write(read(path), path)
    assert path.read_bytes() == first


def test_settings_that_were_not_run_are_absent(tmp_path: Path) -> None:
    result = result_file("PromptFL", {"label-skew": SEEDS})
    write(result, tmp_path / "a.json")
    assert "tuned" not in json.loads((tmp_path / "a.json").read_text())["scenarios"]["label-skew"]
    assert read(tmp_path / "a.json") == result


def test_has_the_field_names_of_the_schema(path: Path) -> None:
    content = json.loads(path.read_text())
    assert content["schema"] == SCHEMA
    run = content["scenarios"]["few-shot"]["tuned"]["seeds"]["2"]
    assert run["global"] == 0.3125
    assert run["diverged"] is None


def test_layout_is_free(path: Path) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(content.items())), indent=4))
    assert read(path) == RESULT


@pytest.mark.parametrize(
    "keys", ["row", "scenarios/few-shot/default/seeds/1/value", "versions/torch", "checksum"]
)
def test_an_edited_file_is_refused(path: Path, keys: str) -> None:
    value: object = 0.51 if keys.endswith("value") else "other"
    edit(path, put(keys, value), signed=False)
    with pytest.raises(DamagedFile, match="checksum") as error:
        read(path)
    assert str(path) in str(error.value)


RUN = "scenarios/few-shot/tuned/seeds/1"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (put(f"{RUN}/value", 1.01), "scenarios.few-shot.tuned.seeds.1.value is 1.01"),
        (put(f"{RUN}/value", -0.01), "tuned.seeds.1.value is -0.01"),
        (put(f"{RUN}/value", None), "tuned.seeds.1.value is null"),
        (put(f"{RUN}/value", "0.5"), "tuned.seeds.1.value is"),
        (put(f"{RUN}/value", True), "tuned.seeds.1.value is true"),
        (put(f"{RUN}/global", 2), "tuned.seeds.1.global is 2"),
        (put(f"{RUN}/bytes_up", -1), "tuned.seeds.1.bytes_up is -1"),
        (put(f"{RUN}/bytes_up", 1.5), "tuned.seeds.1.bytes_up is 1.5"),
        (put(f"{RUN}/bytes_down", 10**30), "tuned.seeds.1.bytes_down is"),
        (put(f"{RUN}/seconds", 10**400), "tuned.seeds.1.seconds is"),
        (put(f"{RUN}/diverged", "a\nb"), "tuned.seeds.1.diverged"),
        (put(f"{RUN}/speed", 1), "tuned.seeds.1.speed is unknown"),
        (drop(f"{RUN}/seconds"), "tuned.seeds.1.seconds is missing"),
        (put("scenarios/few-shot/tuned/seeds/01", {}), "tuned.seeds.01"),
        (put("scenarios/few-shot/tuned/seeds/3", {}), "tuned.seeds.3"),
        (put("scenarios/few-shot/partitions/1", "abc"), "few-shot.partitions.1 is"),
        (drop("scenarios/few-shot/partitions/1"), "few-shot.partitions.1 is missing"),
        (put("scenarios/few-shot/metric", ""), "few-shot.metric is"),
        (put("scenarios/few-shot/default", []), "few-shot.default is []"),
        (put("planned/few-shot", [2]), "few-shot.tuned.seeds.1"),
        (put("planned/few-shot", [1, 2, 1]), "planned.few-shot"),
        (put("planned/few-shot", []), "planned.few-shot"),
        (put("planned", {}), "planned"),
        (put("planned/few-shot", "1"), "planned.few-shot is"),
        (drop("planned/few-shot"), "scenarios.few-shot"),
        (put("suite_hash", "f" * 63), "suite_hash is"),
        (put("row", "\x1b[2J"), "row"),
        (put("row", 7), "row is 7"),
        (drop("row"), "row is missing"),
        (put("author", "me"), "author is unknown"),
        (put("versions/\x07", "1"), "versions.?"),
    ],
)
def test_an_impossible_value_is_refused(
    path: Path, change: Callable[[Any], object], field: str
) -> None:
    edit(path, change)
    with pytest.raises(UserError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}: ")
    assert field in str(error.value)


@pytest.mark.parametrize(("schema", "advice"), [(SCHEMA + 1, "update"), (SCHEMA - 1, "anew")])
def test_another_schema_is_refused(path: Path, schema: int, advice: str) -> None:
    edit(path, put("schema", schema))
    with pytest.raises(UserError, match=advice) as error:
        read(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "\0\0", "[1", "[" * 100_000, '{"a": NaN}', '{"a": 1e999}', '{"a": 1, "a": 2}',
        "null", "[]", "{}", '{"schema": 1}', '{"schema": "1", "suite_hash": 1}', "\xff",
    ],
)  # fmt: skip
def test_a_file_that_is_not_ours_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(UserError) as error:
        read(path)
    assert str(path) in str(error.value)


def test_a_folder_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(UserError, match=str(path)):
            read(path)


def test_every_cut_off_file_is_refused(path: Path) -> None:
    content = path.read_bytes()
    for end in range(0, len(content) - 2, 101):
        path.write_bytes(content[:end])
        with pytest.raises(DamagedFile):
            read(path)


def with_value(value: float) -> ResultFile:
    """The result with another number in one run."""
    scenario = RESULT.scenarios["few-shot"]
    assert scenario.default is not None
    default = replace(scenario.default, seeds={1: seed_result(value)})
    return replace(RESULT, scenarios={"few-shot": replace(scenario, default=default)})


@pytest.mark.parametrize("value", [math.nan, math.inf, 1.5])
def test_what_could_not_be_read_is_not_written(path: Path, value: float) -> None:
    before = path.read_bytes()
    with pytest.raises(UserError, match=str(path)):
        write(with_value(value), path)
    assert path.read_bytes() == before


def test_a_file_of_the_user_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"mine": 1}')
    with pytest.raises(UserError, match=str(path)):
        write(RESULT, path)
    assert path.read_text() == '{"mine": 1}'
