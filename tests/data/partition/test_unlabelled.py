"""Clients without labels, without training images or without test images."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord
from rich.console import Console

from fedprompt.cli.data_views import partition_table
from fedprompt.config.schema import PartitionConfig
from fedprompt.data import open_dataset
from fedprompt.data.partition import make_partition
from fedprompt.data.partition.file import write_partition
from fedprompt.errors import UserError
from fedprompt.experiment.compose import compose
from fedprompt.experiment.display import QuietDisplay
from fedprompt.experiment.run import run
from fedprompt.federation.server_app import Federation
from fedprompt.files.tensors import array_checksum
from fedprompt.messages import to_arrays
from fedprompt.methods.base import UNLABELLED, Batch, Tensors
from fedprompt.methods.parts.losses import labelled_cross_entropy, masked_mean
from fedprompt.methods.promptfl import PromptFL, PromptFLConfig
from fedprompt.reports.partition_figure import partition_figure
from fedprompt.reports.result_tables import remarks
from fedprompt.reports.run_checks import check_partition
from fedprompt.simulation.inline_grid import InlineGrid
from fedprompt.workspace import Workspace
from tests.support.builders import small_config

MakeWorkspace = Callable[..., Workspace]


def test_labels_are_withheld_and_nothing_else(
    make_workspace: MakeWorkspace, caplog: pytest.LogCaptureFixture
) -> None:
    full = make_workspace(partition={"clients": 6}).partition
    assert not caplog.text
    workspace = make_workspace(partition={"clients": 6, "unlabelled_clients": 2})
    partition = workspace.partition
    assert len(partition.unlabelled) == 2
    assert partition.trainable == [k for k in range(6) if k not in partition.unlabelled]
    assert (partition.train_flat == full.train_flat).all()
    assert (partition.test_flat == full.test_flat).all()
    first, second = sorted(partition.unlabelled)
    assert (
        f"2 of 6 clients have no labelled training images and never train: {first}, {second}"
        in (caplog.text)
    )
    with pytest.raises(UserError, match=f"client {first} has no labelled training images"):
        workspace.train_data(first)
    drawn = {
        make_workspace(
            seed=s, partition={"clients": 6, "unlabelled_clients": 2}
        ).partition.unlabelled
        for s in range(1, 9)
    }
    assert len(drawn) > 3
    assert workspace.describe()["unlabelled_clients"] == [first, second]


def test_unlabelled_clients_never_train_and_are_tested(make_workspace: MakeWorkspace) -> None:
    sections: dict[str, Any] = {"partition": {"clients": 6, "unlabelled_clients": 3}}
    workspace = make_workspace(**sections, federation={"rounds": 12, "fraction": 0.5})
    grid = InlineGrid(workspace)
    federation = Federation(workspace, grid)
    federation.join()
    trainable, trained = set(workspace.partition.trainable), set()
    for server_round in range(1, 13):
        line = federation.train_round(server_round)
        assert line["clients"] == {"sampled": 2, "accepted": 2, "rejected": 0}  # half of three
        assert line["train"]["loss"] > 0
        trained |= set(federation.strategy.participants)
    assert trained == trainable
    tested = federation.evaluate(12)["personal"]
    assert tested["clients"] == [k for k in range(6) if len(workspace.partition.test(k))]
    assert workspace.partition.unlabelled & set(tested["clients"])
    for client in workspace.partition.unlabelled:
        assert grid.private.get(client) is None


@pytest.fixture
def agreement(monkeypatch: pytest.MonkeyPatch) -> None:
    """PromptFL, but clients without labels train as well, by the entropy of their answers."""

    def loss_terms(
        self: PromptFL, shared: Tensors, private: Tensors, encoded: Tensors, batch: Batch
    ) -> Tensors:
        logits_KBC = self.logits(encoded, batch.inputs)
        entropy_KB = -(logits_KBC.softmax(-1) * logits_KBC.log_softmax(-1)).sum(-1)
        return {
            "ce": labelled_cross_entropy(logits_KBC, batch),
            "entropy": masked_mean(entropy_KB, batch.mask_KB),
        }

    monkeypatch.setattr(PromptFL, "loss_terms", loss_terms)
    monkeypatch.setattr(PromptFLConfig, "learns_without_labels", True)


HALF: dict[str, Any] = {
    "method": {"name": "promptfl"}, "partition": {"clients": 6, "unlabelled_clients": 3}
}  # fmt: skip


def test_methods_that_learn_without_labels_train_everyone(
    make_workspace: MakeWorkspace, agreement: None, caplog: pytest.LogCaptureFixture
) -> None:
    workspace = make_workspace(**HALF)
    assert workspace.trainable == list(range(6))
    assert workspace.round_size == 6
    hidden = sorted(workspace.partition.unlabelled)[0]
    assert (workspace.train_data(hidden).labels_N == UNLABELLED).all()
    federation = Federation(workspace, InlineGrid(workspace))
    federation.join()
    line = federation.train_round(1)
    assert line["clients"] == {"sampled": 6, "accepted": 6, "rejected": 0, "unlabelled": 3}
    assert line["train"]["loss-entropy"] > 0
    wrapped = make_workspace(**(HALF | {"method": {"name": "fedprox", "base": "promptfl"}}))
    assert wrapped.trainable == list(range(6))


def test_hidden_labels_do_not_reach_the_method(
    make_workspace: MakeWorkspace, agreement: None
) -> None:
    """Other labels of the images of clients that have none: equal bits."""

    def trained(shuffled: bool) -> ArrayRecord:
        workspace = make_workspace(**HALF)
        if shuffled:
            partition = workspace.partition
            own = np.concatenate([partition.train(k) for k in partition.unlabelled])
            labels_N = workspace.dataset.labels_N.copy()
            labels_N[own] = (labels_N[own] + 1) % len(workspace.dataset.class_names)
            workspace.dataset = replace(workspace.dataset, labels_N=labels_N)
        federation = Federation(workspace, InlineGrid(workspace))
        federation.join()
        for server_round in (1, 2):
            federation.train_round(server_round)
        return federation.arrays

    first, second = trained(False), trained(True)
    assert array_checksum(to_arrays(first)) == array_checksum(to_arrays(second))


def test_all_labelled_clients_are_sampled_as_before(make_workspace: MakeWorkspace) -> None:
    workspace = make_workspace(federation={"fraction": 0.5})
    federation = Federation(workspace, InlineGrid(workspace))
    federation.join()
    expected = [federation.strategy.sample(r) for r in range(1, 9)]
    federation.strategy.set_nodes(
        federation.strategy.known.node_of_client
    )  # knows of no one's labels
    assert [federation.strategy.sample(r) for r in range(1, 9)] == expected


def test_table_and_figure_show_who_lacks_labels_or_images(tmp_path: Path) -> None:
    description: dict[str, Any] = {
        "class_names": ["farm", "river"],
        "domain_names": ["north", "south"],
        "train_counts": [[0, 3, 1, 1], [1, 4], []],
        "test_counts": [[0, 1], [], []],
        "domain_counts": [[0, 5], [0, 2, 1, 2], []],
        "server_test_counts": [1, 1],
        "unlabelled_clients": [1],
    }
    console = Console(file=io.StringIO(), width=120)
    console.print(partition_table("mine", description, console.width))
    text = console.file.getvalue()
    rows = [line.split() for line in text.splitlines() if line[1:2].isdigit()]
    assert rows[0] == ["0", "4", "1", "2", "farm", "(75", "%)", "north", "all"]
    assert rows[1] == ["1", "4", "0", "1", "river", "(100", "%)", "2", "none"]
    assert rows[2] == ["2", "0", "0", "0", "-", "0", "all"]
    assert "Without labels: 1." in partition_figure(description).caption
    with pytest.raises(UserError, match="is damaged"):
        check_partition({**description, "unlabelled_clients": [3]}, tmp_path / "partition.json")


def test_somebody_must_have_labels_if_the_method_needs_them(
    make_workspace: MakeWorkspace, request: pytest.FixtureRequest
) -> None:
    none: dict[str, Any] = {"clients": 4, "unlabelled_clients": 4}
    with pytest.raises(UserError, match=r"'unlabelled_clients' is 4 of 4 clients.*'promptfl'"):
        small_config(partition=none, method={"name": "promptfl"})
    with pytest.raises(UserError, match="'unlabelled_clients' is 5 of 4 clients"):
        small_config(partition=none | {"unlabelled_clients": 5})
    request.getfixturevalue("agreement")
    config = small_config(partition=none, method={"name": "promptfl"})
    assert config.able_to_train == 4


def test_results_say_who_trained_without_labels() -> None:
    summary = {"clients": 6, "unlabelled_clients": {"clients": [1, 4], "train": True}}
    [line] = remarks(summary)
    assert "2 of 6 clients" in line
    assert "(1, 4): trained" in line
    summary["unlabelled_clients"] = {"clients": [1, 4], "train": False}
    assert "not trained" in remarks(summary)[0]


@pytest.fixture
def quick(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs a small quickstart with changes; gives its summary and the run's folder."""

    def go(*changes: str) -> dict[str, Any]:
        config = compose(
            "label_skew",
            [
                "data.images_per_class=8",
                "data.domains=[savanna]",
                "federation.rounds=1",
                f"output.dir='{tmp_path / 'run'}'",
                *changes,
            ],
        )
        folder = run(config, QuietDisplay())
        assert (folder / "report.html").is_file()
        return dict(json.loads((folder / "summary.json").read_text()))

    return go


def test_a_whole_run_with_clients_that_lack_something(
    quick: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    config = compose("label_skew", ["data.images_per_class=8", "data.domains=[savanna]"])
    dataset = open_dataset(config.data, 1)
    settings = PartitionConfig(scheme="iid", clients=5)
    path = tmp_path / "p.json"
    write_partition(path, dataset, make_partition(dataset, settings, 1), {})
    content = json.loads(path.read_text())
    content["clients"][0]["labelled"] = False
    content["clients"][1]["train"] = []
    content["clients"][2]["test"] = []
    content["clients"][3].update(train=[], test=[])
    path.write_text(json.dumps(content))
    partition = make_partition(dataset, replace(settings, file=str(path)), 1)
    assert partition.trainable == [2, 4]

    summary = quick(f"partition.file='{path}'", "partition.clients=5")
    assert summary["unlabelled_clients"] == {"clients": [0], "train": False}
    assert "‡" in (tmp_path / "run" / "report.html").read_text()
    assert summary["personal"]["clients"] == [0, 1, 4]
    assert summary["local_only"]["personal"]["clients"] == [0, 1, 4]
    assert summary["zero_shot"]["personal"]["clients"] == [0, 1, 4]
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1])
    assert line["clients"]["sampled"] == 2

    for client in (2, 4):
        content["clients"][client]["labelled"] = False
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="no client has labelled training images"):
        make_partition(dataset, replace(settings, file=str(path)), 1)


def test_a_run_in_which_no_client_has_test_images(
    quick: Callable[..., dict[str, Any]],
) -> None:
    summary = quick("partition.local_test_fraction=0", "partition.clients=3")
    assert summary["personal"] is None
    assert summary["local_only"]["personal"] is None
    assert summary["zero_shot"]["personal"] is None
    assert 0 <= summary["global"]["accuracy"] <= 1
    assert summary["personal_on_global"]["mean"] >= 0
