"""A run folder is read back whole; a damaged one is refused by file and line."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from fedprompt.errors import UserError
from fedprompt.reports.run_data import accuracy_of, load_run
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


def many_lines(rounds: int) -> str:
    """Rounds that test all of three clients, another in each."""
    lines = []
    for number in range(rounds):
        part = {"mean": 0.5, "clients": [0, 1, 2], "accuracy": [0.1 * number, 0.5, 1]}
        tested = {} if number == rounds - 1 else {"personal": part, "personal_on_global": part}
        for kind in ("round", "local_only"):
            lines.append(json.dumps({"kind": kind, "round": number, **tested}) + "\n")
    return "".join(lines)


def test_values_by_client_are_kept_of_the_last_tested_round_alone(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "metrics.jsonl").write_text(many_lines(5))
    whole, part = load_run(folder), load_run(folder, history=False)
    assert whole.rounds[1]["personal"]["clients"] == [0, 1, 2]
    for lines in (part.rounds, part.local_only):
        assert [set(line["personal"]) for line in lines[:3]] == [{"mean"}] * 3
        assert accuracy_of(lines[3]["personal"]) == {0: 0.1 * 3, 1: 0.5, 2: 1}
    assert part.last("personal_on_global") == whole.last("personal_on_global")
    assert accuracy_of(part.last("personal")) == accuracy_of(whole.last("personal"))
    assert part.partition == whole.partition
    assert part.summary == whole.summary


def test_a_comparison_keeps_no_partition_and_no_lists_of_the_summary(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    kept = load_run(folder, history=False, describe=False)
    whole = load_run(folder)
    assert kept.partition is None
    assert kept.summary is not None
    assert whole.summary is not None
    own, before = kept.summary["personal"], whole.summary["personal"]
    assert own == {k: v for k, v in before.items() if not isinstance(v, list)}
    assert accuracy_of(kept.last("personal")) == accuracy_of(whole.last("personal"))


def test_the_memory_of_a_run_does_not_grow_with_rounds_times_clients(tmp_path: Path) -> None:
    folder, clients = write_run(tmp_path / "run"), 2000
    part = {"mean": 0.5, "clients": list(range(clients)), "accuracy": [1 / 3] * clients}
    with (folder / "metrics.jsonl").open("w") as stream:
        for number in range(20):
            line = {"kind": "round", "round": number, "personal": part}
            stream.write(json.dumps(line) + "\n")
    tracemalloc.start()
    try:
        run = load_run(folder, history=False, describe=False)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(run.rounds) == 20
    assert kept < 32 * clients + 200_000, "the last round's two arrays"
    assert peak < 600 * clients + 200_000, "one line and what it says"
