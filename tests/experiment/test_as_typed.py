"""Text stays as typed, in files and overrides: the type of a key decides, not YAML 1.1."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedprompt.config.as_typed import AsTyped, for_kind, with_texts
from fedprompt.config.schema import to_yaml
from fedprompt.experiment.compose import compose, parse
from fedprompt.reports.compare.load import _condition
from fedprompt.sweeps.plan import expand, load_sweep
from tests.support.refusals import refused

NAMES = ["yes", "no", "010", "08", "12:30", "1e3", "null", "~", "on", "0x1F", "2024-01-01", "1_000"]


def test_names_in_files_and_overrides_stay_as_typed(write: Callable[..., Path], base: Path) -> None:
    flow = f"[{', '.join(NAMES)}]"
    block = "".join(f"\n    - {name}" for name in NAMES)
    for config in (
        compose(write(f"data:\n  class_names: {flow}\n")),
        compose(write(f"data:\n  class_names:{block}\n")),
        compose(base, [f"data.class_names={flow}"]),
        compose(base, [f"data={{class_names: {flow}}}"]),
    ):
        assert config.data.class_names == NAMES
        # The config of a run folder, and what a server sends, compose to the same again.
        assert parse(to_yaml(config)).data.class_names == NAMES


def test_single_texts_stay_as_typed(write: Callable[..., Path], base: Path) -> None:
    overrides = {
        "output.dir": "001", "data.title": "run #1: off", "output.root": "[x]/{y}",
        "backbone.checkpoint": "12:30", "experiment": "007",
    }  # fmt: skip
    config = compose(base, [f"{key}={text}" for key, text in overrides.items() if "[" not in text])
    assert config.output.dir == "001"
    assert config.data.title == "run #1: off"
    assert config.backbone.checkpoint == "12:30"
    assert config.experiment == "007"
    assert compose(base, ["data.title='yes'"]).data.title == "yes"
    assert compose(base, ["data.title=[a {b}, c"]).data.title == "[a {b}, c"
    path = write("experiment: 007\noutput: {dir: 001, root: no}\ndata: {title: 1:20}\n")
    config = compose(path)
    assert (config.experiment, config.output.dir, config.output.root) == ("007", "001", "no")
    assert config.data.title == "1:20"


def test_numbers_truth_values_and_null_keep_their_meaning(base: Path) -> None:
    config = compose(
        base, ["evaluation.local_only=no", "training.lr=1e-3", "partition.shots=null", "seed=0x10"]
    )
    assert config.evaluation.local_only is False
    assert config.training.lr == 0.001
    assert config.partition.shots is None
    assert config.seed == 16


@pytest.mark.parametrize("text", ["010", "1:30"])
def test_a_number_that_yaml_reads_as_another_is_refused(base: Path, text: str) -> None:
    for key in ("federation.rounds", "seed", "training.lr"):
        line = refused(lambda key=key: compose(base, [f"{key}={text}"]))
        assert f"{key} is {text}, which YAML reads as {8 if text == '010' else 90}" in line


def test_messages_say_how_to_quote(base: Path, write: Callable[..., Path]) -> None:
    line = refused(lambda: compose(base, ["data.templates=[a photo of a {}.]"]))
    assert """'data.templates=["a photo of a {}."]'""" in line
    assert """["cat"]""" in refused(lambda: compose(base, ["data.class_names=cat"]))
    path = write("data:\n  templates: [a photo of a {}.]\n")
    assert "quotation marks" in refused(lambda: compose(path))
    assert compose(base, ['data.templates=["a photo of a {}."]']).data.templates == [
        "a photo of a {}."
    ]


def test_data_sections_inside_protocol_options(base: Path) -> None:
    config = compose(
        base,
        [
            "protocols=[global, cross_data_set]",
            "protocol_options.cross_data_set.targets="
            "[{use: eurosat, title: 010, class_names: [on, off]}]",
        ],
    )
    (target,) = config.protocol_options["cross_data_set"].targets
    assert target["title"] == "010"
    assert target["class_names"] == ["on", "off"]


def test_grids_and_rows_of_sweeps(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "experiment: quickstart\nrows: {on: [], off: [data.title=off]}\n"
        "grid: {data.class_names: [[yes, no]], training.lr: [1e-3, 0.01]}\nquick: {rows: [on]}\n"
    )
    runs = expand(load_sweep(path), tmp_path)
    assert [run.row for run in runs] == ["on", "on", "off", "off"]
    assert runs[0].config.data.class_names == ["yes", "no"]
    assert runs[0].values["training.lr"] == 0.001
    assert runs[2].config.data.title == "off"
    assert len(expand(load_sweep(path, quick=True), tmp_path)) == 2
    path.write_text("experiment: quickstart\ngrid: {data.title: [yes, 010]}\n")
    runs = expand(load_sweep(path), tmp_path)
    assert [run.config.data.title for run in runs] == ["yes", "010"]
    assert [run.values["data.title"] for run in runs] == ["yes", "010"]


def test_conditions_of_comparisons_match_text_and_value() -> None:
    assert _condition("data.title=yes") == ("data.title", ("true", "yes"))
    assert _condition("training.lr=2e-3") == ("training.lr", ("0.002", "2e-3"))


def test_keys_that_a_merge_brings_in_keep_their_texts(write: Callable[..., Path]) -> None:
    text = "a: &a {x: yes, z: !!int '5'}\nb: {<<: *a, y: no}\n"
    loaded = {"a": {"x": True, "z": 5}, "b": {"x": True, "z": 5, "y": False}}
    merged = with_texts(loaded, text)["b"]
    assert merged == {"x": AsTyped("yes", True), "z": AsTyped("5", 5), "y": AsTyped("no", False)}
    assert for_kind(merged, dict[str, Any], "b") == {"x": True, "z": 5, "y": False}
    path = write("data:\n  <<: {class_names: [yes, no]}\ntraining: {<<: {lr: 010}}\n")
    assert "training.lr is 010" in refused(lambda: compose(path))
    path = write("data:\n  <<: {class_names: [yes, no]}\n")
    assert compose(path).data.class_names == ["yes", "no"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.class_names=on", 'data.class_names is on; it must be a list of texts. Write ["on"]'),
        ("data.class_names=0x1F", 'Write ["0x1F"]'),
        ("federation.rounds=1e3", "federation.rounds is 1e3"),
        ("federation.rounds=off", "federation.rounds is off"),
        (f"training.lr={'9' * 400}", "training.lr is 999"),
        (f"federation.rounds={'9' * 30}", "federation.rounds has more than 18 digits"),
        ("data.root=caf\udce9", "not text in UTF-8"),
    ],
)
def test_messages_show_values_as_typed(base: Path, override: str, words: str) -> None:
    line = refused(lambda: compose(base, [override]))
    assert words in line
    assert len(line) < 400


def test_a_file_without_keys_says_so(tmp_path: Path) -> None:
    contents = {
        b"": "is empty", b"# nothing\n": "is empty", b"5": "'key: value' lines",
        b"seed: 3\ndata: {title: caf\xe9}": "UTF-8 (line 2)", "seed: 3".encode("utf-16"): "UTF-8",
    }  # fmt: skip
    for content, words in contents.items():
        path = tmp_path / "a.yaml"
        path.write_bytes(content)
        line = refused(lambda path=path: compose(path))
        assert words in line
        assert str(path) in line
    assert "no file" in refused(lambda: compose(f"{'x' * 300}.yaml"))
