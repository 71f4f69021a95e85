"""The personal model that a node keeps, and the commands that use it on the node."""

from __future__ import annotations

import logging
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
from flwr.app import MessageType, MetricRecord
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fedprompt.cli.main import app
from fedprompt.config.schema import to_yaml
from fedprompt.deploy import node_model
from fedprompt.deploy.node import answer
from fedprompt.deploy.node_model import MODEL, find_model, load_model
from fedprompt.errors import UserError
from fedprompt.experiment.workspaces import open_workspace
from fedprompt.messages import to_record
from tests.deploy.test_node import message
from tests.support.federations import CLASSES, config_for, write_clients

CLIENT = 1


class Node:
    """A node that has trained and been tested in round 1."""

    def __init__(self, folder: Path, **sections: Any) -> None:
        self.images, self.state = folder / "images", folder / "node" / "state"
        write_clients(self.images)
        self.config = config_for(self.images, folder / "run", rounds=2, **sections)
        self.settings = {
            "partition-id": CLIENT, "data": str(self.images / f"client-{CLIENT}"), "device": "cpu",
            "state-dir": str(self.state),
        }  # fmt: skip
        shared = open_workspace(self.config).method.init_shared(self.config.seed)
        self.start = to_record({n: t.numpy() for n, t in shared.items()})
        self.ask(MessageType.TRAIN)
        metrics = self.ask(MessageType.EVALUATE).content["metrics"]
        assert isinstance(metrics, MetricRecord)
        self.tested, self.correct = metrics["num-examples"], metrics["correct"]

    def ask(self, kind: str, run: str = "r", server_round: int = 1) -> Any:
        settings = {"config": to_yaml(self.config), "run": run}
        reply = answer(message(kind, server_round, self.start), self.settings, settings, 7)
        assert not reply.has_error()
        return reply

    @property
    def folder(self) -> Path:
        return self.state / "r" / f"client-{CLIENT:05d}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Node:
    logging.getLogger("fedprompt").handlers.clear()
    return Node(tmp_path_factory.mktemp("node-model"))


@pytest.fixture
def state(trained: Node, tmp_path: Path) -> Path:
    """A copy of the node's state that a test may change."""
    shutil.copytree(trained.state, tmp_path / "state")
    return tmp_path / "state"


def test_the_kept_model_is_the_one_that_was_tested(trained: Node, tmp_path: Path) -> None:
    workspace = open_workspace(trained.config)
    index = workspace.partition.test(CLIENT)
    paths = [tmp_path / f"{i}.png" for i in index]
    for i, path in zip(index, paths, strict=True):
        workspace.dataset.open_image(int(i)).save(path)
    predictions = load_model(find_model(trained.state)).predict(paths, top=1)
    labels = [CLASSES[workspace.dataset.labels_N[i]] for i in index]
    right = sum(p.classes[0] == label for p, label in zip(predictions, labels, strict=True))
    assert (len(index), right) == (trained.tested, trained.correct)


def test_the_model_uses_the_private_prompts_and_the_last_shared_ones(
    trained: Node, state: Path
) -> None:
    image = next((trained.images / "client-1").rglob("*.png"))
    kept = find_model(state)
    assert (kept.client, kept.server_round, kept.class_names) == (CLIENT, 1, CLASSES)
    before = load_model(kept).predict([image], top=4)[0].probabilities
    (private,) = (state / "r" / kept.folder.name).glob("round-*")
    private.unlink()
    without = load_model(find_model(state)).predict([image], top=4)[0].probabilities
    assert without != before
    for tensor in kept.shared.values():
        tensor.zero_()
    assert load_model(kept).predict([image], top=4)[0].probabilities != without


def test_a_kept_momentum_is_stored_by_round_and_is_no_part_of_the_model(tmp_path: Path) -> None:
    keep = {"momentum_state": "keep"}
    node = Node(tmp_path, method={"name": "ditto"}, strategy={"name": "auto"}, training=keep)

    def trained() -> dict[str, Any]:
        reply = node.ask(MessageType.TRAIN, server_round=2)
        return {n: a.numpy().tobytes() for n, a in reply.content["arrays"].items()}

    assert trained() == trained(), "a repeated round starts from the momentum of the round before"
    files = [load_file(node.folder / f"round-00000{r}.safetensors") for r in (1, 2)]
    first, second = (f["momentum/shared.ctx"] for f in files)
    assert first.any()
    assert not first.equal(second)
    image = next((node.images / "client-1").rglob("*.png"))
    assert load_model(find_model(node.state)).predict([image])


def test_only_the_nodes_user_can_read_it(trained: Node) -> None:
    assert stat.S_IMODE((trained.folder / MODEL).stat().st_mode) == 0o600
    assert stat.S_IMODE(trained.folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("place", ["", "r", "r/client-00001", ".."])
def test_the_commands_find_it_in_any_folder_of_the_node(trained: Node, place: str) -> None:
    assert find_model(trained.state / place).folder.resolve() == trained.folder


def test_the_commands(trained: Node, tmp_path: Path) -> None:
    images = sorted((trained.images / "client-1" / "beach").iterdir())[:2]
    shown = CliRunner().invoke(
        app, ["deploy", "predict", str(trained.state), *map(str, images), "--top", "2"]
    )
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.count("%") == 4
    assert "client 1" in shown.stderr
    assert "round 1" in shown.stderr
    out = tmp_path / "classes.safetensors"
    done = CliRunner().invoke(app, ["deploy", "export", str(trained.state), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert str(out) in "".join(done.output.split("\n"))
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert load_file(out)["class_embeddings"].shape[0] == len(CLASSES)


def test_the_last_run_counts(trained: Node, state: Path) -> None:
    shutil.copytree(state / "r", state / "later")
    later = state / "later" / trained.folder.name / MODEL
    os.utime(later, (later.stat().st_atime, later.stat().st_mtime + 60))
    assert find_model(state).folder == later.parent


def test_mistakes_are_named_in_one_line(trained: Node, state: Path, tmp_path: Path) -> None:
    model = state / "r" / trained.folder.name / MODEL
    with pytest.raises(UserError, match="/none"):
        find_model(tmp_path / "none")
    with pytest.raises(UserError, match="--state"):
        find_model(trained.images)
    with pytest.raises(UserError, match=r"other\.png"):
        load_model(find_model(state)).predict([tmp_path / "other.png"])
    shutil.copytree(model.parent, model.parent.with_name("client-00002"))
    with pytest.raises(UserError, match="2 clients"):
        find_model(state)
    tensors = {n: t + 1 for n, t in load_file(model).items()}
    content = bytearray(model.read_bytes())
    content[-1] ^= 1
    save_file(tensors, tmp_path / "plain.safetensors")
    for damaged in (bytes(content), b"", (tmp_path / "plain.safetensors").read_bytes()):
        model.write_bytes(damaged)
        with pytest.raises(UserError, match=MODEL) as caught:
            find_model(model.parent)
        assert "\n" not in str(caught.value)


def test_an_update_does_not_depend_on_the_kept_model(
    trained: Node, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(node_model, "write_bytes", full)
    monkeypatch.setattr(logging.getLogger("fedprompt"), "propagate", True)
    trained.ask(MessageType.EVALUATE, run="full")
    assert "No space left" in caplog.text
