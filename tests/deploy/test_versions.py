"""A node with another version of fedprompt is refused; other differences are reported."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, MessageType, MetricRecord, RecordDict

from fedprompt.deploy import versions
from fedprompt.deploy.node import answer
from fedprompt.deploy.node_registry import NodeRegistry
from fedprompt.deploy.versions import VERSIONS, check_server, own_versions, read_versions
from fedprompt.errors import UserError
from fedprompt.messages import Refused
from tests.deploy.test_node import message
from tests.deploy.test_node_registry import CLASSES, GOOD, SAMPLE, Nodes


@pytest.fixture(autouse=True)
def version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "__version__", "1.4.2")


def first_answer(**changes: Any) -> RecordDict:
    """A report of a node that runs these versions, and otherwise the server's."""
    record = ConfigRecord({**own_versions(), **changes})
    return RecordDict({"metrics": MetricRecord(GOOD), VERSIONS: record})


def joined(nodes: Nodes) -> bool:
    sample_2D = np.array(SAMPLE, dtype=np.float32).reshape(2, 2)
    registry = NodeRegistry(nodes, 3, CLASSES, {}, sample_2D)
    registry.update()
    return bool(registry.node_of_client)


@pytest.mark.parametrize("theirs", ["1.3.9", "1.5.0", "2.4.2", "0.4.2"])
def test_another_major_or_minor_version_is_refused(
    theirs: str, caplog: pytest.LogCaptureFixture
) -> None:
    nodes = Nodes()
    nodes.answers = {11: first_answer(fedprompt=theirs)}
    assert not joined(nodes)
    assert theirs in caplog.text
    assert "1.4.2" in caplog.text


def test_a_version_is_a_better_reason_than_what_follows_from_it() -> None:
    fault = ConfigRecord({"fault": "config: unknown key 'new'."})
    content = RecordDict({"config": fault, VERSIONS: ConfigRecord({"fedprompt": "1.3.0"})})
    with pytest.raises(Refused, match=r"1\.3\.0"):
        read_versions(content)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (None, "does not say"),
        (ConfigRecord({}), "does not say"),
        (ConfigRecord({"fedprompt": 1}), "does not say"),
        (ConfigRecord({"fedprompt": "new\x1b[2J"}), "does not say"),
        (ConfigRecord({"fedprompt": "1.4.2" + "0" * 10**6}), "does not say"),
        (MetricRecord({"fedprompt": 1}), "does not say"),
    ],
    ids=["none", "empty", "number", "no version", "long", "no text"],
)
def test_a_node_without_a_version_is_refused(record: Any, reason: str) -> None:
    content = RecordDict({} if record is None else {VERSIONS: record})
    with pytest.raises(Refused, match=reason):
        read_versions(content)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"fedprompt": "1.4.9"}, "1.4.9"),
        ({"torch": "2.0.1"}, "torch 2.0.1"),
        ({"flwr": "0.0.1"}, "flwr 0.0.1"),
        ({"flwr": "nonsense"}, "flwr"),
    ],
)
def test_other_differences_are_warnings(
    changes: dict[str, str], named: str, caplog: pytest.LogCaptureFixture
) -> None:
    nodes = Nodes()
    nodes.answers = {11: first_answer(**changes)}
    assert joined(nodes)
    (line,) = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert named in line
    assert "client 1" in line


def test_equal_versions_and_other_builds_are_not_mentioned(
    caplog: pytest.LogCaptureFixture,
) -> None:
    nodes = Nodes()
    torch = own_versions()["torch"].partition("+")[0]
    nodes.answers = {11: first_answer(torch=f"{torch}+cu999")}
    assert joined(nodes)
    assert [r.message for r in caplog.records if r.levelname == "WARNING"] == []


def test_a_node_refuses_a_server_of_another_version() -> None:
    check_server("1.4.9")
    check_server("")  # a plain `flwr run` says none
    with pytest.raises(UserError, match=r"1\.5\.0.*1\.4\.2"):
        check_server("1.5.0")
    run = {"config": "later: {}", "run": "r", VERSIONS: "1.5.0"}
    content = answer(message(MessageType.QUERY), {"partition-id": 1}, run, 7).content
    assert read_versions(content) == own_versions()
    fault = content["config"]
    assert isinstance(fault, ConfigRecord)
    assert "1.5.0" in str(fault["fault"])
