"""Nodes join, leave, return, make false claims, and report what is wrong with their folders."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from google.protobuf.message import DecodeError

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.sample import sample_features
from fedprompt.deploy.backbone_check import has_other_weights
from fedprompt.deploy.node_registry import NodeRegistry
from fedprompt.deploy.node_report import NodeReport, fault_reply, read_report, report_reply
from fedprompt.deploy.versions import VERSIONS, versions_record
from fedprompt.errors import UserError
from fedprompt.messages import METRICS, Refused, become_server, from_wire, to_wire
from fedprompt.runtime.peer_text import LONGEST_REASON
from tests.support.builders import random_clip

CLASSES = ("river", "beach")
SAMPLE = (0.0, 1.0, 0.6, 0.8)


def client(
    k: int, bad: int = 0, train: tuple[int, ...] = (3, 4), labelled: bool = True
) -> NodeReport:
    return NodeReport(k, train, (1, 0), bad, labelled, SAMPLE)


class Nodes(Grid):
    """A grid whose nodes give the replies that a test sets; None means no reply yet."""

    def __init__(self) -> None:
        become_server()
        self.answers: dict[int, Any] = {}
        self.sent: dict[str, Message] = {}
        self.lies: dict[int, dict[str, Any]] = {}

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any:
        return None

    def create_message(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.answers)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            ids.append(f"m{len(self.sent)}")
            message.metadata.__dict__["_message_id"] = ids[-1]
            self.sent[ids[-1]] = message
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for i in message_ids:
            message = self.sent[i]
            answer = self.answers.get(message.metadata.dst_node_id)
            if isinstance(answer, NodeReport):
                reply = from_wire(to_wire(report_reply(answer, message)))
                reply.metadata.__dict__.update(self.lies.get(message.metadata.dst_node_id, {}))
                yield reply
            elif isinstance(answer, str):
                yield fault_reply(answer, message)
            elif isinstance(answer, Error):
                yield Message(answer, reply_to=message)
            elif isinstance(answer, RecordDict):
                content = RecordDict({VERSIONS: versions_record(), **answer})
                yield Message(content, reply_to=message)
            elif isinstance(answer, Exception):
                raise answer  # as Flower does when it parses the replies that it pulls

    def send_and_receive(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("the registry must not wait for replies")


@pytest.fixture
def nodes() -> Nodes:
    return Nodes()


def registry_of(nodes: Nodes, registered: dict[int, int] | None = None) -> NodeRegistry:
    sample_2D = np.array(SAMPLE, dtype=np.float32).reshape(2, 2)
    return NodeRegistry(nodes, 3, CLASSES, registered or {}, sample_2D)


def test_nodes_join_late_leave_and_come_back(
    nodes: Nodes, caplog: pytest.LogCaptureFixture
) -> None:
    registry = registry_of(nodes)
    nodes.answers = {11: client(0), 22: None}
    assert registry.update()
    assert registry.node_of_client == {0: 11}
    assert registry.missing == [1, 2]
    assert not registry.update(), "node 22 has not replied yet, and is not asked twice"
    assert len(nodes.sent) == 2
    nodes.answers[22] = client(2)
    assert registry.update()
    assert registry.node_of_client == {0: 11, 2: 22}
    del nodes.answers[11]
    assert registry.update()
    assert registry.node_of_client == {2: 22}
    assert "client 0 has left (node 11)" in caplog.text
    nodes.answers[11] = client(0)
    assert registry.update()
    assert registry.node_of_client == {0: 11, 2: 22}
    assert len(nodes.sent) == 3


def test_a_node_with_a_fault_is_left_out_and_the_server_logs_why(
    nodes: Nodes, caplog: pytest.LogCaptureFixture
) -> None:
    registry = registry_of(nodes)
    nodes.answers = {11: "data: client-0: <data> has a class 'glacier'", 22: Error(2, "it raised")}
    assert not registry.update()
    assert registry.node_of_client == {}
    assert set(registry.faults) == {11, 22}
    assert "node 11" in caplog.text
    assert "<data> has a class 'glacier'" in caplog.text
    del nodes.answers[11]
    registry.update()
    nodes.answers[11] = client(0)
    assert registry.update(), "repaired and started again"
    assert registry.faults == {22: "it raised"}


def test_a_node_with_a_fault_is_asked_again_after_a_minute(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    registry, clock = registry_of(nodes), [100.0]
    monkeypatch.setattr("fedprompt.deploy.node_registry._now", lambda: clock[0])
    nodes.answers = {11: "data: no readable image"}
    for _ in range(3):
        registry.update()
    assert len(nodes.sent) == 1, "not asked again immediately"
    clock[0] += 61
    registry.update()
    assert len(nodes.sent) == 2
    assert caplog.text.count("no readable image") == 1, "logged once"
    nodes.answers[11] = client(0)
    clock[0] += 61
    assert registry.update()
    assert registry.node_of_client == {0: 11}
    assert registry.faults == {}


def test_empty_classes_and_bad_images_are_logged(
    nodes: Nodes, caplog: pytest.LogCaptureFixture
) -> None:
    registry = registry_of(nodes)
    nodes.answers = {11: NodeReport(1, (0, 4), (0, 1), 2, True, SAMPLE)}
    registry.update()
    assert "'river' (1 of 2 classes)" in caplog.text
    assert "client 1: 2 unreadable images" in caplog.text


def test_two_nodes_cannot_be_the_same_client(nodes: Nodes) -> None:
    registry = registry_of(nodes)
    nodes.answers = {11: client(0), 22: client(0)}
    registry.update()
    assert registry.node_of_client == {0: 11}
    assert "another node" in registry.faults[22]


def test_a_key_belongs_to_one_client(nodes: Nodes) -> None:
    registry = registry_of(nodes, {11: 0, 22: 1})
    nodes.answers = {22: client(0), 33: client(2)}
    assert not registry.update()
    assert "its key is client 1's" in registry.faults[22]
    assert "its key is no client's" in registry.faults[33]
    nodes.answers[11] = client(0)
    assert registry.update()
    assert registry.node_of_client == {0: 11}


@pytest.mark.parametrize(
    ("sample", "welcome"),
    [
        ((0.01, 1.02, 0.6, 0.79), True),
        ((1.0, 0.0, 0.6, 0.8), False),
        ((0.0, 1.0, 0.8, -0.6), False),
        ((0.0, 0.0, 0.0, 0.0), False),
        (SAMPLE[:3], False),
        ((), False),
    ],
)
def test_a_node_with_other_weights_does_not_take_part(
    nodes: Nodes, sample: tuple[float, ...], welcome: bool
) -> None:
    nodes.answers = {11: replace(client(0), sample=sample)}
    registry = registry_of(nodes)
    registry.update()
    assert (registry.node_of_client == {0: 11}) == welcome
    if not welcome:
        assert "backbone.checkpoint" in registry.faults[11]


def test_the_same_model_in_another_format_is_welcome_and_named(
    nodes: Nodes, caplog: pytest.LogCaptureFixture
) -> None:
    """A node is compared with the server's model in the node's own format."""
    rough = (0.6, 0.8, 0.0, 1.0)
    asked: list[str] = []

    def sample_in(weights: str) -> np.ndarray[Any, Any]:
        asked.append(weights)
        if weights == "int4":
            raise UserError("no library")
        return np.array(rough, dtype=np.float32).reshape(2, 2)

    nodes.answers = {
        11: replace(client(0), weights="int8", sample=rough),
        22: replace(client(1), weights="int8"),
        33: replace(client(2), weights="int4"),
    }
    own_2D = np.array(SAMPLE, dtype=np.float32).reshape(2, 2)
    registry = NodeRegistry(nodes, 3, CLASSES, {}, own_2D, "float32", sample_in)
    registry.update()
    assert registry.node_of_client == {0: 11}
    assert registry.reports[0].weights == "int8"
    assert "other weights" in registry.faults[22]
    assert "no library" in registry.faults[33]
    assert asked == ["int8", "int4"]
    lines = [r.getMessage() for r in caplog.records if "in int8" in r.getMessage()]
    assert any(line.startswith("client 0 keeps") and "float32" in line for line in lines)


@pytest.mark.parametrize("allowed", [True, False])
def test_another_image_tower_takes_part_if_the_method_allows_it(
    nodes: Nodes, caplog: pytest.LogCaptureFixture, allowed: bool
) -> None:
    nodes.answers = {11: replace(client(0), sample=(1.0, 0.0, 0.6, 0.8))}
    own_2D = np.array(SAMPLE, dtype=np.float32).reshape(2, 2)
    registry = NodeRegistry(nodes, 3, CLASSES, {}, own_2D, other_image_towers=allowed)
    registry.update()
    assert (registry.node_of_client == {0: 11}) == allowed
    said = [r.getMessage() for r in caplog.records if "image tower" in r.getMessage()]
    assert len(said) == 1
    # Another text tower is refused in any case.
    nodes.answers = {11: replace(client(0), sample=(0.0, 1.0, 0.8, -0.6))}
    registry = NodeRegistry(nodes, 3, CLASSES, {}, own_2D, other_image_towers=allowed)
    registry.update()
    assert not registry.node_of_client


def test_an_unknown_format_is_refused(nodes: Nodes) -> None:
    record = report_reply(
        client(0), Message(RecordDict(), dst_node_id=1, message_type=MessageType.QUERY)
    )
    metrics = record.content[METRICS]
    metrics["weights"] = 99
    with pytest.raises(Refused, match="format"):
        read_report(record.content, 2, 3)


def test_the_sample_distinguishes_weights_but_not_precisions(clip: FrozenCLIP) -> None:
    sample_2D = sample_features(clip)
    assert np.linalg.norm(sample_2D, axis=1) == pytest.approx(1)
    rough = copy.copy(clip)
    rough.precision = "bf16"
    assert not np.array_equal(sample_features(rough), sample_2D)
    assert not has_other_weights(sample_features(rough).ravel().tolist(), sample_2D)
    other = random_clip(vision_cfg={"layers": 4})
    assert has_other_weights(sample_features(other).ravel().tolist(), sample_2D)


def test_counts_of_clients_without_a_node_stay_as_recorded(nodes: Nodes) -> None:
    registry = registry_of(nodes)
    nodes.answers = {11: client(0, train=(3, 0))}
    registry.update()
    rows = registry.partition_rows(None)
    assert rows["train_counts"] == [[0, 3], [], []]
    assert rows["test_counts"] == [[0, 1], [], []]
    assert rows["domain_counts"] == [[0, 4], [], []]
    recorded = {"train_counts": [[9, 9], [1, 5], []], "test_counts": [[], [], []]}
    assert registry.partition_rows(recorded)["train_counts"] == [[0, 3], [1, 5], []]
    assert registry.able_to_train(without_labels=False) == [0]
    nodes.answers[12] = client(1, train=(0, 2), labelled=False)
    nodes.answers[13] = client(2, train=(0, 0))
    registry.update()
    assert registry.able_to_train(without_labels=False) == [0]
    assert registry.able_to_train(without_labels=True) == [0, 1]


GOOD = {
    "client-id": 1, "train-counts": [3, 4], "test-counts": [1, 0], "bad-images": 0, "labelled": 1,
    "sample": list(SAMPLE),
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"client-id": 3},
        {"client-id": -1},
        {"client-id": 1.0},
        {"train-counts": [3]},
        {"train-counts": [3, -4]},
        {"train-counts": [3, 10**12]},
        {"test-counts": [0.5, 1.0]},
        {"bad-images": -1},
        {"labelled": 2},
        {"sample": 1.0},
        {"sample": [0.0, 1.0, float("nan"), 0.8]},
    ],
    ids=str,
)
def test_a_report_is_checked(change: dict[str, Any]) -> None:
    good = RecordDict({"metrics": MetricRecord(GOOD), VERSIONS: versions_record()})
    assert read_report(good, 2, 3).client == 1
    wrong = MetricRecord({**GOOD, **change})
    with pytest.raises(Refused):
        read_report(RecordDict({"metrics": wrong, VERSIONS: versions_record()}), 2, 3)


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        ({"config": ConfigRecord({"other": 1})}, "no reason given"),
        ({"config": ConfigRecord({"fault": 7})}, "no reason given"),
        ({"metrics": ConfigRecord()}, "cannot be read"),
        ({}, "cannot be read"),
        ({"metrics": MetricRecord({**GOOD, "sample": [2**64 - 1, -1]})}, "cannot be read"),
        ({"config": ConfigRecord({"fault": "a\nb\x1b[2J" + "x" * 10**6})}, "a b?[2Jxxx"),
    ],
    ids=str,
)
def test_a_node_that_reports_nonsense_is_refused_in_one_short_line(
    nodes: Nodes, records: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    nodes.answers = {11: RecordDict(records), 22: client(2)}
    registry = registry_of(nodes)
    assert registry.update()
    assert registry.node_of_client == {2: 22}
    assert list(registry.faults) == [11]
    assert reason in registry.faults[11]
    assert registry.faults[11].isprintable()
    assert len(registry.faults[11]) <= LONGEST_REASON
    assert registry.faults[11] in caplog.text


@pytest.mark.parametrize("lie", [{"_reply_to_message_id": "m1"}, {"_reply_to_message_id": "?"},
                                 {"_src_node_id": 22}, {"_src_node_id": 1}], ids=str)  # fmt: skip
def test_an_answer_to_a_join_belongs_to_the_node_that_was_asked(
    nodes: Nodes, lie: dict[str, Any]
) -> None:
    nodes.answers = {11: client(2), 22: client(2)}
    nodes.lies = {11: lie}
    registry = registry_of(nodes, {11: 1, 22: 2})
    assert registry.update()
    assert registry.node_of_client == {2: 22}
    assert list(registry.faults) == [11]
    assert "claims" in registry.faults[11]


@pytest.mark.parametrize("error", [KeyError("x"), RecursionError(), DecodeError("no protobuf")])
def test_an_answer_that_flower_cannot_parse_is_refused(nodes: Nodes, error: Exception) -> None:
    nodes.answers = {11: error, 22: client(2)}
    registry = registry_of(nodes)
    assert registry.update()
    assert registry.node_of_client == {2: 22}
    assert type(error).__name__ in registry.faults[11]
