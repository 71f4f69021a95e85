"""What `import fedprompt` offers: experiments, sweeps and things by name, from Python."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedprompt
from tests.support import ROOT

SMALL: dict[str, Any] = {
    "data": {"images_per_class": 8, "domains": ["savanna"]},
    "partition": {"clients": 3, "alpha": 1.0},
    "evaluation.local_only": False,
    "federation.rounds": 2,
    "simulation.threads": 1,
}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> fedprompt.Result:
    folder = tmp_path_factory.mktemp("api") / "run"
    return fedprompt.run("label_skew", method="promptfl", seed=2, **SMALL, **{"output.dir": folder})


def test_importing_the_package_imports_nothing_slow() -> None:
    code = (
        "import sys, fedprompt; dir(fedprompt); fedprompt.UserError; fedprompt.methods.names();"
        "fedprompt.strategies.names(); fedprompt.protocols.names();"
        "assert not {'torch', 'flwr', 'ray', 'datasets', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_all_that_is_offered_exists() -> None:
    for name in fedprompt.__all__:
        assert getattr(fedprompt, name) is not None
        assert name in dir(fedprompt)
    with pytest.raises(AttributeError, match="no_such_thing"):
        fedprompt.no_such_thing  # noqa: B018


class TestCompose:
    """Changes as values and as text give the same config."""

    def test_dotted_keys_nested_keys_and_text_agree(self) -> None:
        dotted = fedprompt.compose("label_skew", **{"federation.rounds": 3, "method": "promptfl"})
        nested = fedprompt.compose("label_skew", federation={"rounds": 3}, method="promptfl")
        text = fedprompt.compose("label_skew", "federation.rounds=3", "method=promptfl")
        assert dotted == nested == text
        assert dotted.federation.rounds == 3

    def test_a_section_keeps_its_other_keys(self) -> None:
        plain = fedprompt.compose("label_skew")
        changed = fedprompt.compose("label_skew", federation={"fraction": 0.5})
        assert changed.federation.rounds == plain.federation.rounds

    def test_a_group_takes_a_name_with_changes(self) -> None:
        config = fedprompt.compose("label_skew", method={"use": "promptfl", "context_tokens": 4})
        assert (config.method.name, config.method.context_tokens) == ("promptfl", 4)

    def test_a_config_can_be_changed(self) -> None:
        config = fedprompt.compose("label_skew", seed=3)
        other = fedprompt.compose(config, method="promptfl")
        assert (other.seed, other.method.name) == (3, "promptfl")
        assert fedprompt.compose(config) == config

    def test_paths_and_numpy_numbers_are_plain_values(self, tmp_path: Path) -> None:
        changes = {"output.root": tmp_path, "training.lr": np.float64(0.25), "seed": np.int64(4)}
        config = fedprompt.compose("label_skew", **changes)
        assert (config.output.root, config.training.lr, config.seed) == (str(tmp_path), 0.25, 4)

    @pytest.mark.parametrize(
        ("changes", "word"),
        [
            ({"federation.round": 3}, "rounds"),
            ({"federation": {"round": 3}}, "rounds"),
            ({"sed": 3}, "seed"),
            ({"training.lr": -1}, "training.lr"),
            ({"training.lr": object()}, "training.lr"),
            ({"method": "promptfll"}, "promptfl"),
        ],
    )
    def test_wrong_changes_are_refused(self, changes: Mapping[str, Any], word: str) -> None:
        with pytest.raises(fedprompt.UserError, match=word):
            fedprompt.compose("label_skew", **changes)


class TestResult:
    """A finished run, read back."""

    def test_summary_and_config_are_the_folders(self, result: fedprompt.Result) -> None:
        assert result.finished
        assert result.summary == json.loads((result.path / "summary.json").read_text())
        assert (result.config.method.name, result.config.seed) == ("promptfl", 2)

    def test_metrics_are_flat_rows(self, result: fedprompt.Result) -> None:
        assert [row["round"] for row in result.metrics] == [0, 1, 2]
        last = result.metrics[-1]
        assert last["global.accuracy"] == result.summary["global"]["accuracy"]
        assert len(last["personal.accuracy"]) == 3
        assert not [v for row in result.metrics for v in row.values() if isinstance(v, dict)]
        # The start has no training: the part itself is no column beside its keys.
        assert "train" not in result.metrics[0]
        assert "train.loss" in last

    def test_the_table_holds_the_accuracies(self, result: fedprompt.Result) -> None:
        assert f"{100 * result.summary['global']['accuracy']:.1f} %" in result.table()

    def test_figures_are_drawn(self, result: fedprompt.Result, tmp_path: Path) -> None:
        figures = result.figures()
        assert "accuracy_per_round" in figures
        figures["accuracy_per_round"].savefig(tmp_path / "figure.png")
        assert (tmp_path / "figure.png").stat().st_size > 1000

    def test_the_classifier_classifies(self, result: fedprompt.Result, tmp_path: Path) -> None:
        dataset = fedprompt.data.open_dataset(result.config.data, result.config.seed)
        dataset.open_image(0).save(tmp_path / "image.png")
        for client in (None, 1):
            (prediction,) = result.classifier(client).predict([tmp_path / "image.png"])
            assert prediction.classes[0] in dataset.class_names

    def test_nothing_is_printed_unless_asked(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        changes = {**SMALL, "federation.rounds": 0, "output.report": False}
        fedprompt.run("label_skew", **changes, **{"output.dir": tmp_path / "quiet"})
        assert capsys.readouterr().out == ""
        fedprompt.run("label_skew", progress=True, **changes, **{"output.dir": tmp_path / "loud"})
        assert "round 0/0" in capsys.readouterr().out


class TestStopping:
    """A callback may stop a run, which then goes on to the same end."""

    @pytest.mark.parametrize("raises", [True, False])
    def test_a_stopped_run_is_resumed(
        self, result: fedprompt.Result, tmp_path: Path, raises: bool
    ) -> None:
        def stop(line: Mapping[str, Any]) -> bool:
            if raises and line["round"] == 1:
                raise fedprompt.StopRun
            return line["round"] < 1

        ends: list[fedprompt.Result] = []
        stopped = fedprompt.run(
            "label_skew", method="promptfl", seed=2, on_round=stop, on_end=ends.append, **SMALL,
            **{"output.dir": tmp_path / "run"},
        )  # fmt: skip
        assert ends == [stopped]
        assert not stopped.finished
        assert [row["round"] for row in stopped.metrics] == [0, 1]
        with pytest.raises(fedprompt.UserError, match="resume"):
            stopped.table()
        rounds: list[int] = []
        resumed = fedprompt.resume(stopped.path, on_round=lambda line: rounds.append(line["round"]))
        assert rounds == [2]
        assert resumed.finished
        for name in ("metrics.jsonl", "prompts.safetensors"):
            assert (resumed.path / name).read_bytes() == (result.path / name).read_bytes()

    def test_an_error_in_a_callback_is_the_callers(self, tmp_path: Path) -> None:
        def fail(line: Mapping[str, Any]) -> None:
            raise ZeroDivisionError

        target = {"output.dir": tmp_path / "run"}
        with pytest.raises(ZeroDivisionError):
            fedprompt.run("label_skew", on_round=fail, **SMALL, **target)
        assert fedprompt.resume(tmp_path / "run").finished


def test_a_sweep_gives_results_by_name_and_a_table(tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text(
        "experiment: label_skew\nseeds: [1, 2]\n"
        "common: [data.images_per_class=8, 'data.domains=[savanna]', partition.clients=2]\n"
        "rows: {PromptFL: [method=promptfl], Zero: [method=zero_shot]}\n"
    )
    changes = {"federation": {"rounds": 1}, "evaluation.local_only": False, "output.report": False}
    swept = fedprompt.sweep(
        tmp_path / "two.yaml", seeds=[1], out=tmp_path / "out", **changes, **{"partition.alpha": 1}
    )
    assert len(swept.runs) == 2
    assert not swept.failures
    assert {r.config.method.name for r in swept.runs.values()} == {"promptfl", "zero_shot"}
    assert all(r.finished for r in swept.runs.values())
    assert "PromptFL" in swept.table()


def test_things_are_listed_and_opened_by_name() -> None:
    assert fedprompt.methods.get("promptfl").name == "promptfl"
    assert fedprompt.strategies.get("fedavg").name == "fedavg"
    assert fedprompt.protocols.get("calibration").name == "calibration"
    for package in (fedprompt.methods, fedprompt.strategies, fedprompt.protocols):
        assert package.names() == sorted(package.names())
        with pytest.raises(fedprompt.UserError, match="no_such"):
            package.get("no_such")


def test_data_sets_are_listed_and_opened_by_name() -> None:
    assert {"aerial_scenes", "eurosat"} <= set(fedprompt.data.names())
    dataset = fedprompt.data.open("aerial_scenes", images_per_class=8, domains=["savanna"])
    assert len(dataset.class_names) == 20
    with pytest.raises(fedprompt.UserError, match="eurosat"):
        fedprompt.data.open("eurosatt")
    with pytest.raises(fedprompt.UserError, match="images_per_class"):
        fedprompt.data.open("aerial_scenes", images_per_clas=8)
