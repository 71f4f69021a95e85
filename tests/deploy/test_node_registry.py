"""Who is there: nodes join, leave, come back, lie, and say what is wrong with their folders."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.deploy.backbone_check import differs, sample_features
from fedprompt.deploy.node_registry import Roster
from fedprompt.deploy.node_report import Description, fault_reply, from_reply, to_reply
from fedprompt.messages import become_server, from_wire, to_wire
from tests.support.builders import random_clip

CLASSES = ("river", "beach")
SAMPLE = (0.0, 1.0, 0.6, 0.8)


def client(k: int, bad: int = 0, train: tuple[int, ...] = (3, 4)) -> Description:
    return Description(k, train, (1, 0), bad, True, SAMPLE)


class Nodes(Grid):
    """A grid whose nodes answer what the test says; None = not yet."""

    def __init__(self) -> None:
        become_server()
        self.answers: dict[int, Any] = {}
        self.sent: dict[str, Message] = {}

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
            if isinstance(answer, Description):
                yield from_wire(to_wire(to_reply(answer, message)))
            elif isinstance(answer, str):
                yield fault_reply(answer, message)
            elif isinstance(answer, Error):
                yield Message(answer, reply_to=message)

    def send_and_receive(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("a roster waits for nobody")


@pytest.fixture
def nodes() -> Nodes:
    return Nodes()


def roster(nodes: Nodes, keyed: dict[int, int] | None = None) -> Roster:
    sample_2D = np.array(SAMPLE, dtype=np.float32).reshape(2, 2)
    return Roster(nodes, 3, CLASSES, keyed or {}, sample_2D)


def test_nodes_join_late_leave_and_come_back(
    nodes: Nodes, caplog: pytest.LogCaptureFixture
) -> None:
    found = roster(nodes)
    nodes.answers = {11: client(0), 22: None}
    assert found.update()
    assert found.node_of_client == {0: 11}
    assert found.missing == [1, 2]
    assert not found.update(), "node 22 has not answered yet, and is not asked twice"
    assert len(nodes.sent) == 2
    nodes.answers[22] = client(2)
    assert found.update()
    assert found.node_of_client == {0: 11, 2: 22}
    del nodes.answers[11]
    assert found.update()
    assert found.node_of_client == {2: 22}
    assert "client 0 has left (node 11)" in caplog.text
    nodes.answers[11] = client(0)
    assert found.update()
    assert found.node_of_client == {0: 11, 2: 22}
    assert len(nodes.sent) == 3


def test_a_fault_is_said_on_the_server_and_the_node_left_out(
    nodes: Nodes, caplog: pytest.LogCaptureFixture
) -> None:
    found = roster(nodes)
    nodes.answers = {11: "data: client-0: <data> has a class 'glacier'", 22: Error(2, "it raised")}
    assert not found.update()
    assert found.node_of_client == {}
    assert set(found.faults) == {11, 22}
    assert "node 11 does not take part: data: client-0: <data> has a class 'glacier'" in caplog.text
    del nodes.answers[11]
    found.update()
    nodes.answers[11] = client(0)
    assert found.update(), "mended and started again"
    assert found.faults == {22: "it raised"}


def test_a_folder_that_is_mended_is_noticed(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found, clock = roster(nodes), [100.0]
    monkeypatch.setattr("fedprompt.deploy.node_registry._now", lambda: clock[0])
    nodes.answers = {11: "data: no readable image"}
    for _ in range(3):
        found.update()
    assert len(nodes.sent) == 1, "not asked again at once"
    clock[0] += 61
    found.update()
    assert len(nodes.sent) == 2
    assert caplog.text.count("no readable image") == 1, "said once"
    nodes.answers[11] = client(0)
    clock[0] += 61
    assert found.update()
    assert found.node_of_client == {0: 11}
    assert found.faults == {}


def test_classes_that_are_lacking_and_bad_images_are_said(
    nodes: Nodes, caplog: pytest.LogCaptureFixture
) -> None:
    found = roster(nodes)
    nodes.answers = {11: Description(1, (0, 4), (0, 1), 2, True, SAMPLE)}
    found.update()
    assert "client 1: no image of 'river' (1 of 2 classes)" in caplog.text
    assert "client 1: 2 unreadable images left out" in caplog.text


def test_two_nodes_cannot_be_one_client(nodes: Nodes) -> None:
    found = roster(nodes)
    nodes.answers = {11: client(0), 22: client(0)}
    found.update()
    assert found.node_of_client == {0: 11}
    assert "as another node does" in found.faults[22]


def test_a_key_is_one_clients(nodes: Nodes) -> None:
    found = roster(nodes, {11: 0, 22: 1})
    nodes.answers = {22: client(0), 33: client(2)}
    assert not found.update()
    assert "its key is client 1's" in found.faults[22]
    assert "its key is no client's" in found.faults[33]
    nodes.answers[11] = client(0)
    assert found.update()
    assert found.node_of_client == {0: 11}


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
def test_other_weights_do_not_take_part(
    nodes: Nodes, sample: tuple[float, ...], welcome: bool
) -> None:
    nodes.answers = {11: replace(client(0), sample=sample)}
    there = roster(nodes)
    there.update()
    assert (there.node_of_client == {0: 11}) == welcome
    if not welcome:
        assert "other weights than the server's" in there.faults[11]


def test_a_sample_tells_weights_apart_and_not_precisions(clip: FrozenCLIP) -> None:
    ours_2D = sample_features(clip)
    assert np.linalg.norm(ours_2D, axis=1) == pytest.approx(1)
    rough = copy.copy(clip)
    rough.precision = "bf16"
    assert not np.array_equal(sample_features(rough), ours_2D)
    assert not differs(sample_features(rough).ravel().tolist(), ours_2D)
    other = random_clip(vision_cfg={"layers": 4})
    assert differs(sample_features(other).ravel().tolist(), ours_2D)


def test_counts_of_those_who_were_never_there_stay_as_recorded(nodes: Nodes) -> None:
    found = roster(nodes)
    nodes.answers = {11: client(0, train=(3, 0))}
    found.update()
    rows = found.described(None)
    assert rows["train_counts"] == [[0, 3], [], []]
    assert rows["test_counts"] == [[0, 1], [], []]
    assert rows["domain_counts"] == [[0, 4], [], []]
    recorded = {"train_counts": [[9, 9], [1, 5], []], "test_counts": [[], [], []]}
    assert found.described(recorded)["train_counts"] == [[0, 3], [1, 5], []]
    assert found.trainable == [0]


def reply_with(record: Any, name: str = "metrics") -> Message:
    become_server()
    message = Message(RecordDict(), dst_node_id=5, message_type="query")
    message.metadata.__dict__["_message_id"] = "m"
    return Message(RecordDict({name: record}), reply_to=message)


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
def test_a_description_is_checked(change: dict[str, Any]) -> None:
    assert isinstance(from_reply(reply_with(MetricRecord(GOOD)), 2, 3), Description)
    assert isinstance(from_reply(reply_with(MetricRecord({**GOOD, **change})), 2, 3), str)


def test_a_peers_text_is_one_short_line() -> None:
    reply = reply_with(ConfigRecord({"fault": "a\nb" + "x" * 9000}), "config")
    said = from_reply(reply, 2, 3)
    assert isinstance(said, str)
    assert "\n" not in said
    assert len(said) <= 500
    assert from_reply(reply_with(ConfigRecord({"other": 1}), "config"), 2, 3) == "no reason given"
    assert "cannot be read" in str(from_reply(reply_with(ConfigRecord(), "metrics"), 2, 3))
