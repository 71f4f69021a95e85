"""A run folder is read back whole; a damaged one is refused by file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedprompt.errors import UserError
from fedprompt.reports.run_data import load_run
from tests.support.fake_runs import write_run


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    folder = write_run(tmp_path / "run")
    (folder / name).unlink()
    with pytest.raises(UserError, match=rf"{name} is missing"):
        load_run(folder)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere is not a run folder"):
        load_run(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "metrics.jsonl",
            '{"kind": "round", "round": 0}\n{"kind": "ro\n',
            r"line 2, column \d+ is",
        ),
        ("metrics.jsonl", '{"kind": "round", "round": 0}\n\n', "line 2, column 1 is damaged"),
        ("metrics.jsonl", "[1]\n", "line 1 is damaged: a list, not a JSON object"),
        ("metrics.jsonl", '{"kind": "round"}\n', "line 1 is damaged: it needs a 'kind'"),
        ("metrics.jsonl", '{"kind": "round", "round": 0, "global": 3}\n', "line 1 is .*'global'"),
        (
            "metrics.jsonl",
            '{"kind": "round", "round": 0, "personal": {"accuracy": [0.5, "x"]}}\n',
            "line 1, personal is damaged: 'accuracy' is 'x', not a number",
        ),
        (
            "metrics.jsonl",
            '{"kind": "round", "round": 0, "personal": {"clients": [1], "accuracy": [0, 1]}}\n',
            "line 1 is damaged: 'personal' needs as many 'clients' as 'accuracy'",
        ),
        (
            "summary.json",
            '{"personal": {"clients": [1.5], "accuracy": [1]}}',
            "'personal' needs as many 'clients'",
        ),
        ("metrics.jsonl", "", "holds no round yet"),
        ("timings.jsonl", '{"round": 0, "train_s": 1}\noops\n', "line 2, column 1 is damaged"),
        ("timings.jsonl", '{"train_s": "long"}\n', "line 1 is damaged: 'train_s' is 'long'"),
        ("partition.json", "{\n  oops\n}", "line 2, column 3 is damaged"),
        ("partition.json", '{"class_names": ["a"], "train_counts": [[1, 2]]}', "'class_names'"),
        ("partition.json", '{"class_names": ["a"], "train_counts": [[-1, 2]]}', "'class_names'"),
        ("partition.json", '{"class_names": ["a"], "train_counts": 3}', "'class_names'"),
        (
            "partition.json",
            '{"class_names": ["a"], "train_counts": [[0, 2]], "test_counts": []}',
            "'class_names'",
        ),
        ("partition.json", '{"class_names": ["a"], "train_counts": [[1], []]}', "'class_names'"),
        ("summary.json", '{"global": {', r"line 1, column \d+ is damaged"),
        ("summary.json", '{"local_only": {"personal": {"mean": "x"}}}', "local_only, personal is"),
        ("summary.json", '{"zero_shot": 1}', "'zero_shot' must be an object"),
        ("config.yaml", "a: [1\n", "damaged"),
        ("config.yaml", "- a\n", "must hold 'key: value' lines"),
    ],
)
def test_a_damaged_file_is_refused_by_name(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    folder = write_run(tmp_path / "run")
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_run(folder)
    assert str(folder / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_last_line_that_is_still_being_written_is_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", rounds=2)
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text + '{"kind": "local_only", "rou')
    assert len(load_run(folder).local_only) == 3


def test_text_that_is_not_utf8_is_refused_by_name(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "metrics.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged: it is not UTF-8"):
        load_run(folder)
