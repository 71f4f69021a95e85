"""One of two clients reports anything it likes; the results are those of the other client."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from flwr.app import ConfigRecord, Error, Message, MessageType, MetricRecord, RecordDict

from fedprompt.evaluation.registry import DEFAULT
from fedprompt.federation.client_app import handle
from fedprompt.federation.server_app import Federation
from fedprompt.messages import METRICS
from fedprompt.methods.base import Tensors
from fedprompt.simulation.inline_grid import InlineGrid
from fedprompt.workspace import Workspace

MakeWorkspace = Callable[..., Workspace]
ASKING = ("per_class", "calibration", "privacy_audit")
LIARS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "other names": lambda row: {f"~{name}": value for name, value in row.items()},
    "names that come last and first": lambda row: {"~": 1, "": 2, "client-ids": 3},
    "one name less": lambda row: dict(list(row.items())[:-1]),
    "no names": lambda row: {},
    "lists": lambda row: {name: [value] for name, value in row.items()},
    "NaN": lambda row: dict.fromkeys(row, float("nan")),
    "infinite": lambda row: dict.fromkeys(row, float("inf")),
    "huge": lambda row: dict.fromkeys(row, 1.7e308),
    "huge integers": lambda row: dict.fromkeys(row, 2**63 - 1),
    "negative": lambda row: dict.fromkeys(row, -5),
    "an error": lambda row: Error(2, "\x1b[2J" + "x" * 10**6),
    "no metrics": lambda row: RecordDict({"metrics": ConfigRecord()}),
}


def lying(lie: Callable[[dict[str, Any]], Any]) -> Any:
    """A handler in which client 1 lies in evaluations."""

    def answer(
        workspace: Workspace,
        clients: Sequence[int],
        messages: Sequence[Message],
        private: Mapping[int, Tensors],
    ) -> tuple[list[Message], dict[int, Tensors]]:
        replies, changed = handle(workspace, clients, messages, private)
        for k, (client, message) in enumerate(zip(clients, messages, strict=True)):
            if client == 1 and message.metadata.message_type == MessageType.EVALUATE:
                content = lie(dict(replies[k].content.metric_records[METRICS]))
                if isinstance(content, dict):
                    content = RecordDict({METRICS: MetricRecord(content)})
                replies[k] = Message(content, reply_to=message)
        return replies, changed

    return answer


@pytest.fixture
def measured(make_workspace: MakeWorkspace) -> Callable[[Any], tuple[Any, Any]]:
    """The metrics line of an evaluation and the results of the protocols, as they are written."""
    workspace = make_workspace(
        partition={"clients": 2, "alpha": 10.0},
        method={"name": "promptfl", "context_tokens": 2},
        protocols=[*DEFAULT, *ASKING],
        protocol_options={"privacy_audit": {"images": 0}},
    )

    def measure(lie: Any) -> tuple[Any, Any]:
        federation = Federation(workspace, InlineGrid(workspace, answer=lying(lie)))
        federation.join()
        line = federation.evaluate(1)
        federation.ask_clients(1)
        parts = federation.measure_protocols([], {})
        # What is not plain JSON would end the run when it is written.
        return json.loads(json.dumps([line, parts], allow_nan=False))

    return measure


@pytest.mark.parametrize("name", LIARS)
def test_a_lying_client_is_left_out(
    measured: Callable[[Any], tuple[Any, Any]], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    line, parts = measured(LIARS[name])
    assert line["personal"]["clients"] == [0]
    assert (line, parts) == tuple(measured(lambda row: Error(2, "away")))
    dropped = [r.getMessage() for r in caplog.records if "client 1: evaluation" in r.getMessage()]
    # The reasons of two exchanges, and that of the comparison, which comes twice and is said once.
    assert dropped
    assert dropped[-1].endswith("away")
    assert len(set(dropped)) == len(dropped)
    assert all(text.isprintable() and len(text) < 1000 for text in dropped)


def test_more_numbers_than_asked_for_change_nothing(
    measured: Callable[[Any], tuple[Any, Any]],
) -> None:
    more = {"client-ids": 7, "per_class.tested-99": 1, "zeal": float("nan")}
    assert measured(lambda row: {**more, **row}) == measured(lambda row: row)
