"""Flower messages <-> local training and evaluation, for one client or for a block of them.

`handle` is the whole client. A simulation's grid gives it a list of messages; Flower's ClientApp
(fedprompt/deploy) gives it one. A reply carries the method's shared tensors and metrics; private
tensors are returned beside the replies and kept by the caller on the client's side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)

from fedprompt.errors import UserError
from fedprompt.evaluation.registry import open_protocols
from fedprompt.messages import ARRAYS, CONFIG, EXTRAS, METRICS, to_record, values_of
from fedprompt.methods.base import Tensors
from fedprompt.privacy.local_noise import protected
from fedprompt.scoring import score_personal
from fedprompt.training import train_clients
from fedprompt.workspace import Workspace

PROTOCOLS = "protocols"
"""Key of an evaluate message that asks for what the protocols measure on clients."""


def handle(
    workspace: Workspace,
    clients: Sequence[int],
    messages: Sequence[Message],
    private: Mapping[int, Tensors],
) -> tuple[list[Message], dict[int, Tensors]]:
    """Answer one message per client; all messages are of one type and round.

    Args:
        workspace: this process's data, CLIP and method.
        clients: client ids, in the order of `messages`.
        messages: what the server sent.
        private: private tensors of clients that have trained before.

    Returns:
        Replies in the same order, and the private tensors that training has changed.
    """
    kind = messages[0].metadata.message_type
    if kind == MessageType.TRAIN:
        return _train(workspace, clients, messages, private)
    if kind == MessageType.EVALUATE:
        answer = _measure if _settings(messages[0]).get(PROTOCOLS) else _evaluate
        return answer(workspace, clients, messages, private), {}
    raise UserError(f"clients do not answer messages of type '{kind}'.")


def _train(
    workspace: Workspace,
    clients: Sequence[int],
    messages: Sequence[Message],
    private: Mapping[int, Tensors],
) -> tuple[list[Message], dict[int, Tensors]]:
    config = workspace.config
    results = train_clients(
        workspace.method,
        [_received(workspace, m) for m in messages],
        [private.get(c) or workspace.start_private(c) for c in clients],
        [workspace.train_data(c) for c in clients],
        config.training,
        seed=config.seed,
        server_round=server_round(messages[0]),
        rounds=config.federation.rounds,
    )
    replies = []
    for message, result in zip(messages, results, strict=True):
        shared, losses = result.shared, result.losses
        examples = result.num_examples
        if config.privacy.noise:
            last, now = _received(workspace, message), server_round(message)
            shared = protected(last, shared, config.privacy, server_round=now, client=result.client)
            examples, losses = 1, {}
        arrays = to_record({n: t.numpy() for n, t in shared.items()})
        named = {n if n == "loss" else f"loss-{n}": v for n, v in losses.items()}
        metrics = MetricRecord({"num-examples": examples, **named})
        content = RecordDict({ARRAYS: arrays, METRICS: metrics})
        replies.append(Message(content, reply_to=message))
    return replies, {r.client: r.private for r in results if r.private}


def _evaluate(
    workspace: Workspace,
    clients: Sequence[int],
    messages: Sequence[Message],
    private: Mapping[int, Tensors],
) -> list[Message]:
    common = workspace.config.evaluation.personal_on_global
    own, everyone = score_personal(
        workspace.method,
        [_received(workspace, m) for m in messages],
        [private.get(c) or workspace.start_private(c) for c in clients],
        [workspace.test_data(c) for c in clients],
        workspace.server_test() if common else None,
    )
    replies = []
    for k, message in enumerate(messages):
        metrics = {"num-examples": own[k].tested, "correct": own[k].correct}
        if everyone is not None:
            metrics |= {"common-tested": everyone[k].tested, "common-correct": everyone[k].correct}
        content = RecordDict({METRICS: MetricRecord({**metrics})})
        replies.append(Message(content, reply_to=message))
    return replies


def _measure(
    workspace: Workspace,
    clients: Sequence[int],
    messages: Sequence[Message],
    private: Mapping[int, Tensors],
) -> list[Message]:
    """What the protocols ask of clients at the end, as `<protocol>.<name>`."""
    shared = [_received(workspace, m) for m in messages]
    own = [private.get(c) or workspace.start_private(c) for c in clients]
    rows: list[dict[str, int | float]] = [{} for _ in clients]
    for protocol in open_protocols(workspace.config):
        if protocol.asks_clients:
            numbers = protocol.measure_clients(workspace, clients, shared, own)
            for row, given in zip(rows, numbers, strict=True):
                row.update({f"{protocol.name}.{n}": v for n, v in given.items()})
    return [
        Message(RecordDict({METRICS: MetricRecord({**row})}), reply_to=m)
        for row, m in zip(rows, messages, strict=True)
    ]


def server_round(message: Message) -> int:
    """The round a message belongs to."""
    value = _settings(message)["server-round"]
    assert isinstance(value, int)
    return value


def _settings(message: Message) -> ConfigRecord:
    settings = message.content[CONFIG]
    assert isinstance(settings, ConfigRecord)
    return settings


def _received(workspace: Workspace, message: Message) -> Tensors:
    """The shared tensors of a message and what came beside them, as the method declares them."""
    shared = _read(workspace, message, ARRAYS, workspace.shared_shapes)
    if workspace.extras_shapes:
        shared |= _read(workspace, message, EXTRAS, workspace.extras_shapes)
    return shared


def _read(
    workspace: Workspace,
    message: Message,
    record_name: str,
    expected: Mapping[str, tuple[int, ...]],
) -> Tensors:
    record = message.content.get(record_name)
    if not isinstance(record, ArrayRecord) or set(record) != set(expected):
        found = sorted(record) if isinstance(record, ArrayRecord) else "nothing"
        raise UserError(
            f"the server sent {found} as {record_name}, but method '{workspace.method.name}' "
            f"expects {sorted(expected)}; server and client must run the same experiment."
        )
    tensors = {}
    for name, shape in expected.items():
        array = values_of(record[name])
        if array.shape != shape or array.dtype != np.float32:
            raise UserError(
                f"the server sent '{name}' as {array.dtype} {array.shape}; expected float32 "
                f"{shape}. Server and client must run the same experiment."
            )
        tensors[name] = torch.from_numpy(array)
    return tensors
