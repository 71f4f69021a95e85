"""Runs of the multi-label task: what is refused before any work, one run, and its resume."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sklearn.metrics import average_precision_score

from fedprompt.config.schema import Config
from fedprompt.errors import UserError
from fedprompt.evaluation.registry import figures, result_tables
from fedprompt.experiment.compose import compose
from fedprompt.experiment.display import QuietDisplay
from fedprompt.experiment.predict import Classifier
from fedprompt.experiment.run import resume, run
from fedprompt.experiment.workspaces import ResourceCache, open_workspace
from fedprompt.federation.client_app import model_of_client
from fedprompt.files.tensors import read_tensors
from fedprompt.methods.base import takes_label_sets
from fedprompt.methods.registry import all_methods
from fedprompt.reports.compare.figures import comparison_figures
from fedprompt.reports.compare.load import load_rows
from fedprompt.reports.compare.metrics import choose
from fedprompt.reports.compare.table import compare_rows
from fedprompt.reports.result_tables import remarks
from fedprompt.reports.run_data import load_run
from fedprompt.reports.run_figures import loss_figure, run_figures
from fedprompt.scoring import encode_global, logits_of
from tests.support.builders import small_config
from tests.support.displays import StopAfter

DATA = {"source": "aerial_objects", "images_per_class": 4, "domains": ["delta"]}


@pytest.mark.parametrize("name", ["coop_csc", "fedrsclip", "fedtpg", "scaffold", "tip_adapter"])
def test_other_methods_are_refused_and_those_that_can_are_named(name: str) -> None:
    with pytest.raises(UserError) as refusal:
        small_config(data=DATA, method={"name": name}, strategy={"name": "auto"})
    message = str(refusal.value)
    assert f"'{name}'" in message
    assert "aerial_objects" in message
    able = {name for name, cls in all_methods().items() if takes_label_sets(cls)}
    assert all(other in message for other in able)
    assert "\n" not in message


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"protocols": ["global", "calibration"]}, ["'calibration'", "personalised"]),
        ({"protocols": ["global", "base_to_new"]}, ["'base_to_new'"]),
        ({"protocols": ["global", "ood"]}, ["'ood'"]),
        ({"partition": {"labels_per_round": 2}}, ["partition.labels_per_round"]),
        ({"attack": {"kind": "label_flip", "share": 0.3}}, ["attack.kind=label_flip"]),
        (
            {"partition": {"sessions": 3}, "protocols": ["class_incremental"]},
            ["'class_incremental'"],
        ),
        ({"multi_label": {"clip": 1.0}}, ["clip"]),
        ({"multi_label": {"loss": "hinge"}}, ["multi_label.loss", "bce"]),
    ],
)
def test_what_has_no_meaning_is_refused(sections: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as refusal:
        small_config(data=DATA, **{"method": {"name": "promptfl"}, **sections})
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_the_loss_of_label_sets_is_refused_where_there_is_one_class() -> None:
    with pytest.raises(UserError, match="multi_label"):
        small_config(multi_label={"loss": "bce"})


def test_shipped_configs_of_the_task() -> None:
    config = compose("multilabel", [])
    assert config.data.multi_label
    published = compose("multilabel", ["data=mlrsnet_labels", "data.root=/x"])
    assert published.data.multi_label
    assert not compose("quickstart", []).data.multi_label


@pytest.fixture(scope="module")
def config() -> Config:
    return small_config(
        data=DATA,
        method={"name": "fedpgp", "context_tokens": 2},
        partition={"clients": 3, "scheme": "iid", "local_validation_fraction": 0.2},
        training={"lr": 0.01},
        protocols=["global", "personalised", "fairness"],
    )


@pytest.fixture(scope="module")
def finished(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return started(config, tmp_path_factory.mktemp("multi_label") / "run")


def started(config: Config, folder: Path, display: QuietDisplay | None = None) -> Path:
    config = replace(config, output=replace(config.output, dir=str(folder)))
    return run(config, display or QuietDisplay(), RESOURCES)


RESOURCES = ResourceCache()


def read(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def test_a_run_reports_map_of_global_and_personal_models(config: Config, finished: Path) -> None:
    summary = read(finished)
    assert summary["score"] == "mAP"
    workspace = open_workspace(config, resources=RESOURCES)
    tensors, _ = read_tensors(finished / "prompts.safetensors")
    shared = {n.removeprefix("shared/"): t for n, t in tensors.items()}
    inputs, targets = workspace.server_test()
    (answers,) = logits_of(workspace.method, encode_global(workspace.method, shared), inputs)
    there = targets.numpy().any(axis=0)
    expected = average_precision_score(targets[:, there], answers[:, there], average="macro")
    assert summary["global"]["accuracy"] == pytest.approx(expected, abs=1e-6)
    assert 0 < summary["global"]["macro_f1"] < 1
    assert 0 < summary["zero_shot"]["accuracy"] < 1
    assert len(summary["personal"]["accuracy"]) == 3
    assert summary["personal"]["accuracy"] != summary["personal_on_global"]["accuracy"]
    assert summary["personal"]["mean"] > summary["zero_shot"]["personal"]["mean"] - 0.2
    assert summary["protocols"]["fairness"]
    assert model_of_client(workspace, 0, {}).keys() == {"U", "V"}


def test_reports_call_the_score_by_its_name(finished: Path) -> None:
    summary = read(finished)
    assert "mAP" in remarks(summary)[0]
    loaded = load_run(finished)
    loss = loss_figure(loaded)
    assert loss is not None
    assert "Asymmetric" in loss.caption
    # Names of files and keys are the same for every score; what a reader sees is not.
    drawn = [*run_figures(loaded), *figures(loaded)]
    assert {"accuracy_per_round", "client_accuracy"} <= {figure.name for figure in drawn}
    assert {"Test mAP per round", "Personal mAP per client"} <= {figure.title for figure in drawn}
    [fairness] = result_tables(summary, "summary.json")
    words = [repr([figure.title, figure.caption, figure.panels]) for figure in drawn]
    assert not re.search("accurac", " ".join([*words, repr(fairness)]), re.IGNORECASE)


def test_comparisons_call_the_score_by_its_name(finished: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(finished, other)
    summary = read(other)
    del summary["score"]
    (other / "summary.json").write_text(json.dumps(summary))
    (other / "checksums.txt").unlink()
    cases = ([finished], "mAP"), ([other], "Accuracy"), ([finished, other], "Accuracy or mAP")
    for paths, name in cases:
        rows = [row for path in paths for row in load_rows([path]).rows]
        assert compare_rows(rows, choose(None, rows)).note.startswith(f"{name} in percent")
        titles = {figure.title for figure in comparison_figures(rows)}
        assert f"{name} over rounds" in titles


def test_a_resumed_run_is_the_same(config: Config, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        started(config, folder, StopAfter(2))
    assert not (folder / "summary.json").exists()
    resume(folder, QuietDisplay(), RESOURCES)
    for name in ("metrics.jsonl", "prompts.safetensors"):
        assert (folder / name).read_bytes() == (finished / name).read_bytes(), name


def test_predictions_of_one_class_are_refused(finished: Path) -> None:
    with pytest.raises(UserError, match="aerial_objects"):
        Classifier(finished)


def test_training_labels_are_the_sets_of_the_clients_images(config: Config) -> None:
    workspace = open_workspace(config, resources=RESOURCES)
    data, own = workspace.train_data(1), workspace.partition.train(1)
    assert workspace.dataset.targets_NC is not None
    assert data.labels_N.bool().tolist() == workspace.dataset.targets_NC[own].tolist()
