"""A node's replies, computed in this process and by its worker."""

from __future__ import annotations

import logging
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict

from fedprompt.config.schema import Config, to_yaml
from fedprompt.data.partition.pseudo_labels import Totals, images_chosen
from fedprompt.deploy import node as node_module
from fedprompt.deploy import worker, worker_client
from fedprompt.deploy.folders import NodeFolder
from fedprompt.deploy.node import answer, experiment_text
from fedprompt.deploy.node_config import read_node_settings
from fedprompt.deploy.node_report import NodeReport, read_report
from fedprompt.deploy.worker import answer_one, listen
from fedprompt.deploy.worker_client import WorkerUnavailable, ask_worker
from fedprompt.errors import DeviceFault, UserError
from fedprompt.experiment.compose import parse
from fedprompt.experiment.workspaces import open_workspace
from fedprompt.federation.pseudo_labelling import LABELLING, TOTALS
from fedprompt.messages import Refused, become_server, to_arrays, to_record, to_wire
from fedprompt.methods.registry import method_class
from fedprompt.runtime.peer_text import LONGEST_REASON
from tests.support.builders import small_config
from tests.support.fake_data import truncated
from tests.support.federations import CLASSES, config_for, write_clients


@pytest.fixture
def images(tmp_path: Path) -> Path:
    write_clients(tmp_path / "images")
    return tmp_path / "images"


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose path is short enough for a socket in it."""
    with tempfile.TemporaryDirectory(prefix="fp") as folder:
        yield Path(folder)


def settings(images: Path, client: int = 1, **more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A node's settings, and the run config of an experiment that names no existing folder."""
    config = config_for(images, Path("run"))
    text = to_yaml(config).replace(str(images), "/not/here")
    node = {"partition-id": client, "data": str(images / f"client-{client}"), "device": "cpu"}
    return node | {"state-dir": str(images.parent / "state")} | more, {"config": text, "run": "r"}


def message(kind: str, server_round: int = 1, arrays: Any = None) -> Message:
    become_server()
    content = RecordDict({"config": ConfigRecord({"server-round": server_round})})
    if arrays is not None:
        content["arrays"] = arrays
    sent = Message(content, dst_node_id=5, message_type=kind)
    sent.metadata.__dict__["_message_id"] = "m"
    return sent


def reported(reply: Message) -> NodeReport | str:
    """What the server reads in the reply to a query: a report, or the reason of a refusal."""
    try:
        return read_report(reply.content, len(CLASSES), 3)
    except Refused as reason:
        return str(reason)


def start_of(images: Path) -> Any:
    config = config_for(images, Path("run"))
    workspace = open_workspace(config)
    start = method_class("fedrsclip").init_shared(workspace.method, config.seed)
    return to_record({n: t.numpy() for n, t in start.items()})


def test_a_node_reports_its_images(images: Path) -> None:
    reply = answer(message(MessageType.QUERY), *settings(images), 7)
    report = reported(reply)
    assert isinstance(report, NodeReport)
    assert report.client == 1
    assert [a + b for a, b in zip(report.train_C, report.test_C, strict=True)] == [9, 10, 11, 12]


def test_a_fault_of_the_folder_is_one_line_on_both_sides(
    images: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    logging.getLogger("fedprompt").handlers.clear()
    (images / "client-1" / "beach" / "bad.jpg").write_bytes(truncated())
    reply = answer(message(MessageType.QUERY), *settings(images), 7)
    fault = reported(reply)
    assert isinstance(fault, str)
    assert "<data>/beach/bad.jpg" in fault
    assert str(images) not in fault, "the server must not learn where a node's images are"
    logged = capfd.readouterr().err
    assert f"{images}/client-1/beach/bad.jpg" in logged
    assert logged.count("\n") == 1
    (images / "client-1" / "beach" / "bad.jpg").unlink()
    (images / "client-1" / "glacier").mkdir()
    reply = answer(message(MessageType.TRAIN, 1), *settings(images), 7)
    assert reply.has_error()
    assert "glacier" in str(reply.error.reason)
    assert "data.class_names" in str(reply.error.reason)


@pytest.mark.parametrize(
    "node",
    [{"data": "IMAGES"}, {}, {"data": "IMAGES", "num-partitions": 3}],
    ids=["lends", "lends nothing", "lends in a simulation"],
)
def test_a_node_takes_the_experiment_as_text_and_opens_no_file_that_the_server_names(
    images: Path, node: dict[str, Any]
) -> None:
    secret = images.parent / "secret.yaml"
    secret.write_text("db_password_hunter2: 1\n")
    own = {k: str(images / "client-1") if v == "IMAGES" else v for k, v in node.items()}
    faults = set()
    for experiment in (str(secret), str(images / "none.yaml"), "quickstart"):
        run = {"experiment": experiment, "overrides": f"partition.file={secret}"}
        reply = answer(message(MessageType.QUERY), {"partition-id": 1, **own}, run, 7)
        faults.add(reported(reply))
    (fault,) = faults  # the same whether the file exists or not
    assert isinstance(fault, str)
    assert "hunter2" not in fault
    assert "deploy run" in fault


def test_a_client_of_flowers_simulation_follows_the_experiments_name(tmp_path: Path) -> None:
    path = tmp_path / "experiment.yaml"
    path.write_text(to_yaml(small_config(partition={"clients": 2})))
    node = read_node_settings({"partition-id": 1, "num-partitions": 2})
    run = {"experiment": str(path), "overrides": "seed=9"}
    config = parse(experiment_text(run, node))
    assert (config.partition.clients, config.seed) == (2, 9)


def test_a_node_needs_its_own_copy_of_the_experiments_weights(
    images: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    logging.getLogger("fedprompt").handlers.clear()
    config = config_for(images, Path("run"), backbone={"checkpoint": "/server/weights.pt"})
    node, run = settings(images)
    run["config"] = to_yaml(config)
    fault = reported(answer(message(MessageType.QUERY), node, run, 7))
    assert isinstance(fault, str)
    assert "backbone.checkpoint" in fault
    logged = capfd.readouterr().err
    assert fault in logged
    assert logged.count("\n") == 1
    with_weights = settings(images, checkpoint=str(images / "weights.pt"))[0]
    reply = answer(message(MessageType.QUERY), with_weights, run, 7)
    assert isinstance(reported(reply), NodeReport)


def test_a_node_that_requires_more_protection_reports_nothing_about_its_data(images: Path) -> None:
    node, run = settings(images, **{"require-secure-aggregation": True})
    fault = reported(answer(message(MessageType.QUERY), node, run, 7))
    assert isinstance(fault, str)
    assert "secure_aggregation.enabled" in fault
    reply = answer(message(MessageType.TRAIN, 1, start_of(images)), node, run, 7)
    assert reply.has_error()
    assert reply.error.reason == fault
    assert not (images.parent / "state").exists()


def test_the_worker_replies_like_the_process_itself(images: Path, short: Path) -> None:
    shared = start_of(images)
    path = short / "worker.sock"
    with listen(path) as listener:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600

        def serve() -> None:
            for _ in range(3):
                line, _ = listener.accept()
                with line:
                    answer_one(line)

        threading.Thread(target=serve, daemon=True).start()
        for kind in (MessageType.QUERY, MessageType.TRAIN, MessageType.EVALUATE):
            asked = message(kind, 1, shared)
            direct = answer(asked, *settings(images, **{"state-dir": str(short / "direct")}), 7)
            node, run = settings(images, **{"state-dir": str(short / "worker")})
            by_worker = ask_worker(str(path), asked, node, run, 7)
            assert not direct.has_error(), direct.error
            assert direct.content == by_worker.content
    for folder in ("direct", "worker"):
        files = [p.name for p in (short / folder).rglob("*.safetensors")]
        assert sorted(files) == ["model.safetensors", "round-000001.safetensors"]


def test_a_worker_that_is_absent_or_dies(short: Path) -> None:
    asked = message(MessageType.QUERY)
    with pytest.raises(WorkerUnavailable):
        ask_worker(str(short / "none.sock"), asked, {}, {}, 7, patience_s=0.5)
    path = short / "worker.sock"
    with listen(path) as listener:

        def die() -> None:
            line, _ = listener.accept()
            worker_client.receive_block(line)
            line.close()

        threading.Thread(target=die, daemon=True).start()
        reply = ask_worker(str(path), asked, {}, {}, 7)
    assert reply.has_error()
    assert "worker ended" in str(reply.error.reason)


def test_a_message_that_the_worker_fails_on_is_an_error_reply(short: Path) -> None:
    asked = message(MessageType.TRAIN)
    near, far = socket.socketpair()
    with near, far:
        worker_client.send_block(near, b'{"node_config": 3, "run_config": {}, "run_id": 7}')
        worker_client.send_block(near, to_wire(asked))
        worker_client.send_block(near, b"")  # no state of secure aggregation
        answer_one(far)
        assert b"TypeError" in worker_client.receive_block(near)


def test_a_worker_ends_when_its_device_has_failed(
    short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After its reply; `deploy node` starts another one, as after any exit."""

    class Sticky(RuntimeError):
        """Stands for `torch.AcceleratorError`, which older releases of PyTorch do not have."""

    def failing(*_: object) -> None:
        raise Sticky("CUDA error: unspecified launch failure")

    monkeypatch.setattr(worker, "DEVICE_ERRORS", (Sticky,))
    monkeypatch.setattr(worker, "answer", failing)
    path, replies = short / "worker.sock", []
    asking = threading.Thread(
        target=lambda: replies.append(
            ask_worker(str(path), message(MessageType.TRAIN), {}, {}, 7, patience_s=60)
        )
    )
    asking.start()
    with pytest.raises(DeviceFault, match="unspecified launch failure"):
        worker.serve(path)
    asking.join()
    assert replies[0].error.reason == "Sticky", "the text stays on the node"


def test_the_socket_of_a_deep_folder_is_elsewhere(tmp_path: Path, short: Path) -> None:
    assert NodeFolder(short, "s:1", 0).worker_socket == short / "worker.sock"
    deep = [NodeFolder(tmp_path / ("x" * 120) / name, "s:1", 0).worker_socket for name in "ab"]
    assert deep[0] != deep[1]
    assert all(len(str(path)) < 100 for path in deep)
    with listen(deep[0]):
        assert stat.S_IMODE(deep[0].parent.stat().st_mode) == 0o700
    deep[0].unlink()


def test_a_socket_that_cannot_be_created_is_reported(short: Path) -> None:
    (short / "file").write_text("")
    with pytest.raises(UserError, match="cannot listen on"):
        listen(short / "file" / "worker.sock")


def test_the_client_app_does_not_import_pytorch() -> None:
    code = "import sys, fedprompt.deploy.client_app; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", [MessageType.TRAIN, MessageType.EVALUATE])
def test_tensors_that_are_not_finite_are_refused_before_anything_is_trained(
    images: Path, kind: str, value: float
) -> None:
    node, run = settings(images)
    assert not answer(message(MessageType.TRAIN, 1, start_of(images)), node, run, 7).has_error()
    state = images.parent / "state"
    before = {p: p.read_bytes() for p in state.rglob("*.safetensors")}
    assert before
    arrays = to_arrays(start_of(images))
    next(iter(arrays.values())).flat[-1] = value
    reply = answer(message(kind, 2, to_record(arrays)), node, run, 7)
    assert reply.has_error()
    assert "not finite" in str(reply.error.reason)
    assert {p: p.read_bytes() for p in state.rglob("*.safetensors")} == before


def test_tensors_that_cannot_be_read_are_one_line(images: Path) -> None:
    arrays = start_of(images)
    name = next(iter(arrays))
    evil = f"{name}\x1b[2J" + "x" * 10**5
    broken = Array("float32", tuple(arrays[name].shape), "numpy.ndarray", b"\x1b[2J")
    for wrong in (ArrayRecord({**arrays, name: broken}), ArrayRecord({**arrays, evil: broken})):
        reply = answer(message(MessageType.TRAIN, 1, wrong), *settings(images), 7)
        assert reply.has_error()
        reason = str(reply.error.reason)
        assert "the server sent" in reason
        assert reason.isprintable()
        assert len(reason) < 3 * LONGEST_REASON
    assert not list((images.parent / "state").rglob("*.safetensors"))


def test_clients_of_one_simulation_process_share_its_workspace(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower's engine has every process answer for many clients in turn."""
    opened: list[Config] = []
    monkeypatch.setattr(node_module, "open_workspace", lambda config: opened.append(config))
    node_module._opened.cache_clear()
    config = small_config(seed=7)
    for client in (0, 1, 2, 0, 3):
        node = read_node_settings({"partition-id": client, "num-partitions": 4})
        node_module._workspace(config, node)
    assert opened == [config]
    # Nodes that lend a folder have workspaces of their own.
    lending = config_for(images, Path("run"))
    for client in (0, 1):
        settings = {"partition-id": client, "data": str(images / f"client-{client}")}
        node_module._workspace(lending, read_node_settings(settings))
    assert len(opened) == 3
    node_module._opened.cache_clear()


def test_a_node_without_labels_keeps_its_guesses_from_one_message_to_the_next(
    images: Path,
) -> None:
    node, run = settings(images)
    text = to_yaml(config_for(images, Path("run"))).replace(str(images), "/not/here")
    run["config"] = text.replace("unlabelled_clients: 0", "unlabelled_clients: 3").replace(
        "relabel_every: null", "relabel_every: 2"
    )
    start = start_of(images)

    def ask(kind: str, server_round: int, **entries: Any) -> Message:
        sent = message(kind, server_round, start)
        sent.content["config"] = ConfigRecord({"server-round": server_round, **entries})
        return answer(sent, node, run, 7)

    totals = {TOTALS: [1, 30, 3, 4, 3, 2, 1]}
    early = ask(MessageType.TRAIN, 1, **totals)
    assert "phase 1" in str(early.error.reason)
    first, again = (ask(MessageType.EVALUATE, 0, **{LABELLING: 1}) for _ in range(2))
    counts = first.content["metrics"]
    assert dict(counts) == dict(again.content["metrics"])
    sure_C, guessed_C = (
        np.array([counts[f"{kind}-{c}"] for c in range(4)]) for kind in ("sure", "guessed")
    )
    expected = images_chosen(Totals(1, (4, 3, 2, 1), 30, 3).quota(sure_C), guessed_C)
    for server_round in (1, 2):
        trained = ask(MessageType.TRAIN, server_round, **totals)
        assert trained.content["metrics"]["num-examples"] == expected
