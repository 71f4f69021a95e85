"""The client's side of a round: Flower messages in, local training or evaluation, replies out.

`handle` is the whole client. A simulation's grid passes it the messages of several clients; on a
node of a deployment, the worker passes it the messages of one (`fedprompt.deploy.node`). A reply
contains the method's shared tensors and metrics. Private tensors are never part of a reply: they
are returned beside the replies, and the caller stores them on the client's side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from flwr.app import (
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from torch import Tensor

from fedprompt.data.partition.queries import ASKED, OF_LABELS
from fedprompt.data.partition.stages import Stage, stage_of
from fedprompt.errors import UserError
from fedprompt.evaluation.registry import open_protocols
from fedprompt.federation.personal_evaluation import count_correct
from fedprompt.federation.pseudo_labelling import LABELLING, guess_labels, pseudo_labels
from fedprompt.federation.received import received
from fedprompt.messages import ARRAYS, CONFIG, METRICS, to_record
from fedprompt.methods.base import Tensors
from fedprompt.optimizer import STORED, with_momentum, without_momentum
from fedprompt.privacy.local_noise import protected
from fedprompt.scoring import encode_personal, logits_of
from fedprompt.training import train_clients
from fedprompt.workspace import Workspace

PROTOCOLS = "protocols"
"""Key in the settings of an evaluation message. If it is set, the evaluation protocols measure the
clients, and the personal models are not tested."""
COMMON = "common-test"
"""Key in the settings of an evaluation message. If it is set, the personal models are also tested
on the server's test images; see `fedprompt.federation.common_evaluation`."""

BACKDOOR = "backdoor"
"""Key in the settings of an evaluation message to an attacker of a simulation, who then measures
how often its backdoor works (`fedprompt/simulation/backdoor.py`); honest clients never see it."""

QUERY = "query"
"""Key in the settings of an evaluation message. In active learning, the number of the active round
for which the clients ask for labels, instead of being tested."""
LABELS = "labels"
"""The metric with which a client answers a query: how many labels it has asked for so far."""


def handle(
    workspace: Workspace,
    clients: Sequence[int],
    messages: Sequence[Message],
    private: Mapping[int, Tensors],
) -> tuple[list[Message], dict[int, Tensors]]:
    """Answer one message for each of some clients.

    Args:
        workspace: this process's data, CLIP and method.
        clients: client ids, in the order of `messages`.
        messages: what the server sent; all of one type and one round.
        private: what the clients that have trained before have stored, by client id: private
            tensors, and momentum if the experiment keeps it.

    Returns:
        Replies in the order of `messages`, and what clients are to store after training, by client
        id.

    Raises:
        UserError: the messages do not fit the experiment, or a client has no data to train on.
    """
    # All messages of a call have the same type and round, so the first one decides.
    kind = messages[0].metadata.message_type
    if kind not in (MessageType.TRAIN, MessageType.EVALUATE):
        raise UserError(f"clients do not answer messages of type '{kind}'.")
    present = workspace.at(server_round(messages[0]))
    if kind == MessageType.TRAIN:
        stage = stage_of(workspace.config, server_round(messages[0]))
        return _train(present, clients, messages, private, stage)
    settings = _settings(messages[0])
    models = [model_of_client(present, c, private.get(c, {})) for c in clients]
    if settings.get(QUERY):
        return _ask_labels(workspace, clients, messages, private, models)
    if phase := settings.get(LABELLING):
        shared = [received(workspace, m) for m in messages]
        rows, changed = guess_labels(workspace, clients, shared, models, private, int(str(phase)))
        return _replies(rows, messages), changed
    # Protocols measure at the end of a run, when there is everything.
    if settings.get(PROTOCOLS):
        return _measure(workspace, clients, messages, models), {}
    return _evaluate(present, clients, messages, models), {}


def _train(
    workspace: Workspace,
    clients: Sequence[int],
    messages: Sequence[Message],
    stored: Mapping[int, Tensors],
    stage: Stage,
) -> tuple[list[Message], dict[int, Tensors]]:
    """Train, and reply with the shared tensors and losses."""
    config = workspace.config
    # The models that it remembers will not be evaluated again.
    workspace.memo.clear()
    kept = {c: stored.get(c, {}) for c in clients}
    chosen = [
        pseudo_labels(workspace, c, _settings(m), kept[c])
        for c, m in zip(clients, messages, strict=True)
    ]
    results = train_clients(
        workspace.method,
        [received(workspace, m) for m in messages],
        [model_of_client(workspace, c, kept[c], p) for c, p in zip(clients, chosen, strict=True)],
        [
            workspace.train_data(c, kept[c].get(ASKED), p)
            for c, p in zip(clients, chosen, strict=True)
        ],
        config.training,
        seed=stage.seed,
        server_round=stage.server_round,
        rounds=stage.rounds,
        momentum=[without_momentum(kept[c])[1] for c in clients],
        graphs=workspace.graphs,
        privacy=config.privacy,
    )
    replies = []
    for message, result in zip(messages, results, strict=True):
        shared, losses, statistics = result.shared, result.losses, result.statistics
        examples = result.num_examples
        if config.privacy.image_noise:
            # The losses have no noise. The number of images is public, as image_epsilon.py says.
            losses, statistics = {}, {}
        if config.privacy.noise:
            # A noisy reply reveals nothing else: neither losses, statistics nor number of images.
            shared = protected(
                received(workspace, message),
                shared,
                config.privacy,
                server_round=server_round(message),
                client=result.client,
            )
            examples, losses, statistics = 1, {}, {}
        # `to_record` copies, so the reply does not share memory with the training results.
        arrays = to_record({n: t.numpy() for n, t in shared.items()})
        # The server reads as losses the metrics whose names start with `loss`, see screening.py.
        named = {n if n == "loss" else f"loss-{n}": v for n, v in losses.items()}
        named |= {f"statistic-{n}": v for n, v in statistics.items()}
        # `num-examples` is the name that Flower's own strategies use.
        metrics = MetricRecord({"num-examples": examples, **named})
        content = RecordDict({ARRAYS: arrays, METRICS: metrics})
        replies.append(Message(content, reply_to=message))
    changed = {
        r.client: with_momentum(r.private, r.momentum)
        | {n: t for n, t in kept[r.client].items() if n.startswith(OF_LABELS)}
        for r in results
    }
    return replies, {c: tensors for c, tensors in changed.items() if tensors}


def model_of_client(
    workspace: Workspace, client: int, stored: Tensors, pseudo_N: Tensor | None = None
) -> Tensors:
    """A client's private tensors: what it has stored of them, else its seeded start.

    Args:
        workspace: this process's data, CLIP and method.
        client: the client's id.
        stored: what it has stored.
        pseudo_N: its pseudo-labels, if it trains on some.
    """
    known = stored.get(ASKED), pseudo_N
    return without_momentum(stored)[0] or workspace.start_private(client, *known)


def _ask_labels(
    workspace: Workspace,
    clients: Sequence[int],
    messages: Sequence[Message],
    stored: Mapping[int, Tensors],
    private: Sequence[Tensors],
) -> tuple[list[Message], dict[int, Tensors]]:
    """Ask for labels, reply with their number alone, and forget the model of the last ones."""
    method, changed, replies = workspace.method, {}, []
    active_round = int(str(_settings(messages[0])[QUERY]))
    for client, message, own in zip(clients, messages, private, strict=True):
        train = workspace.partition.train(client)
        asked_N = stored.get(client, {}).get(ASKED, torch.zeros(len(train)))
        # A message that comes again, after the server was interrupted, finds its answer.
        if not (asked_N == active_round).any():
            encoded = encode_personal(method, [received(workspace, message)], [own])
            inputs = workspace.views[0].rows(train, method.needs)
            logits_NC = torch.cat(list(logits_of(method, encoded, inputs)))
            answers_NC = logits_NC.double().softmax(-1)
            asked_N = workspace.ask(client, answers_NC, asked_N, active_round)
            momentum = {n: t for n, t in stored.get(client, {}).items() if n.startswith(STORED)}
            # The model starts again. Every name is stored again, as stores expect it.
            changed[client] = {
                ASKED: asked_N,
                **workspace.start_private(client, asked_N),
                **{n: torch.zeros_like(t) for n, t in momentum.items()},
            }
        metrics = MetricRecord({LABELS: int((asked_N > 0).sum())})
        replies.append(Message(RecordDict({METRICS: metrics}), reply_to=message))
    return replies, changed


def _evaluate(
    workspace: Workspace,
    clients: Sequence[int],
    messages: Sequence[Message],
    private: Sequence[Tensors],
) -> list[Message]:
    """Test the personal models, and reply with counts of correct answers."""
    rows = count_correct(
        workspace,
        clients,
        [received(workspace, m) for m in messages],
        private,
        common=bool(_settings(messages[0]).get(COMMON)),
    )
    return _replies(rows, messages)


def _measure(
    workspace: Workspace,
    clients: Sequence[int],
    messages: Sequence[Message],
    private: Sequence[Tensors],
) -> list[Message]:
    """Reply with what the protocols measure on clients, as `<protocol>.<name>`."""
    shared = [received(workspace, m) for m in messages]
    rows: list[dict[str, int | float]] = [{} for _ in clients]
    for protocol in open_protocols(workspace.config):
        if protocol.asks_clients:
            results = protocol.measure_clients(workspace, clients, shared, private)
            for row, result in zip(rows, results, strict=True):
                # Prefixed, so that two protocols may use the same name for different values.
                row.update({f"{protocol.name}.{n}": v for n, v in result.items()})
    return _replies(rows, messages)


def _replies(
    rows: Sequence[Mapping[str, int | float]], messages: Sequence[Message]
) -> list[Message]:
    """Replies with one row of numbers each."""
    return [
        Message(RecordDict({METRICS: MetricRecord({**row})}), reply_to=message)
        for row, message in zip(rows, messages, strict=True)
    ]


def server_round(message: Message) -> int:
    """The round, from 1, that a message of the server belongs to; 0 before any training."""
    value = _settings(message)["server-round"]
    assert isinstance(value, int)
    return value


def asks_for_backdoor(message: Message) -> bool:
    """Whether the server of a simulation asks attackers how often their backdoor works."""
    return message.metadata.message_type == MessageType.EVALUATE and BACKDOOR in _settings(message)


def _settings(message: Message) -> ConfigRecord:
    settings = message.content[CONFIG]
    assert isinstance(settings, ConfigRecord)
    return settings
