"""Rounds of secure aggregation that a test can watch and tamper with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict

from fedprompt.config.protection import SecureAggregationConfig
from fedprompt.federation.server_app import Federation
from fedprompt.messages import client_of, from_wire, to_arrays, to_wire
from fedprompt.privacy.secure_aggregation import (
    COLLECT,
    CONFIRM,
    RECORD,
    SETUP,
    SHARE_KEYS,
    UNMASK,
    flower,
    stage_of,
)
from fedprompt.privacy.secure_aggregation.params import Terms
from fedprompt.simulation.inline_grid import InlineGrid
from fedprompt.workspace import Workspace

MakeWorkspace = Callable[..., Workspace]
"""Type of the fixture `make_workspace`."""
STAGES = (SETUP, SHARE_KEYS, COLLECT, CONFIRM, UNMASK)
PROMPTFL = {"name": "promptfl", "context_tokens": 2}
ON = {"enabled": True, "max_weight": 100}
"""The section `secure_aggregation` of these tests."""


class TappedGrid(InlineGrid):
    """Keeps every message of training; hooks change what is sent and what comes back."""

    def __init__(self, workspace: Workspace, **options: Any) -> None:
        super().__init__(workspace, **options)
        self.sent: list[Message] = []
        self.got: list[Message] = []
        self.tamper: Callable[[str | None, Message], Message | None] = lambda stage, m: m
        self.spoil: Callable[[str | None, Message], Message | None] = lambda stage, m: m

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        sent = list(messages)
        stage = stage_of(sent[0])
        # Across the wire: nothing is shared by reference.
        passed = [self.tamper(stage, from_wire(to_wire(m))) for m in sent]
        replies = super().send_and_receive([m for m in passed if m is not None], timeout=timeout)
        for message, copied in zip(sent, passed, strict=True):
            if copied is not None:
                message.metadata.__dict__["_message_id"] = copied.metadata.message_id
        kept = [self.spoil(stage, r) for r in replies]
        self.sent += sent
        self.got += [r for r in kept if r is not None]
        return [r for r in kept if r is not None]


def federation_of(workspace: Workspace) -> tuple[Federation, TappedGrid]:
    grid = TappedGrid(workspace)
    federation = Federation(workspace, grid)
    federation.join()
    return federation, grid


def values(federation: Federation) -> Any:
    return federation.shared["ctx"].double().numpy()


def one_round(workspace: Workspace) -> tuple[Any, dict[str, Any]]:
    federation, _ = federation_of(workspace)
    line = federation.train_round(1)
    return values(federation), line


def bound_for(workspace: Workspace, sampled: int, counted: Sequence[int] | None = None) -> float:
    """The derived bound, and half a last place of float32 for each of two results."""
    settings = workspace.config.secure_aggregation
    counted = range(workspace.num_clients) if counted is None else counted
    weight = np.mean([len(workspace.partition.train(c)) / settings.max_weight for c in counted])
    bound = error_bound(settings.clip, Terms.of(settings, sampled).levels, float(weight))
    assert bound < 1e-6
    return bound + float(np.finfo(np.float32).eps)  # all prompts are below 1 in size


def fedavg_of(workspace: Workspace, counted: Iterable[int]) -> Any:
    """The plain mean of some clients' tensors after round 1, in float64."""
    config = workspace.config
    plain = make_plain(workspace)
    federation, grid = federation_of(plain)
    federation.train_round(1)
    by_client = {client_of(r.metadata.src_node_id): r for r in grid.got}
    arrays = {c: to_arrays(by_client[c].content["arrays"])["ctx"] for c in counted}  # type: ignore[arg-type]
    images = {c: len(workspace.partition.train(c)) for c in counted}
    assert config.strategy.name == "fedavg"
    return sum(images[c] * a.astype(np.float64) for c, a in arrays.items()) / sum(images.values())


def make_plain(workspace: Workspace) -> Workspace:
    config = replace(workspace.config, secure_aggregation=SecureAggregationConfig())
    return Workspace(
        config, workspace.clip, workspace.dataset, workspace.partition, workspace.views
    )


def error_bound(clip: float, levels: int, mean_weight: float) -> float:
    """Largest error of a number of the mean change, as derived in vector.py."""
    return 3 * clip / (levels * mean_weight)


def is_from(client: int, message: Message) -> bool:
    return client_of(message.metadata.src_node_id) == client


def masked_numbers(grid: TappedGrid) -> dict[int, Any]:
    found = {}
    for message in grid.got:
        record = message.content.config_records[RECORD]
        if flower.Key.MASKED_PARAMETERS in record:
            content = record[flower.Key.MASKED_PARAMETERS]
            assert isinstance(content, bytes)
            client = client_of(message.metadata.src_node_id)
            found[client] = np.frombuffer(content, "<u4").astype(np.float64)
    return found


def record_of(message: Message, changes: Mapping[str, Any]) -> Message:
    record = {**message.content.config_records[RECORD], **changes}
    message.content = RecordDict({**message.content, RECORD: ConfigRecord(record)})
    return message
