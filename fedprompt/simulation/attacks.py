"""Malicious and broken clients in a simulation.

`handle` answers a block's messages as `client_app.handle` does, but corrupts what the attackers
send. The attackers are a fixed fraction of the clients, drawn from the seed. A simulation's grid
calls it instead of the honest function if `attack.kind` names an attack; the clients of a
deployment never do.

Let Delta be the change that honest training makes to the received shared tensors, and
s = `attack.scale`. An attacker sends the received tensors plus
    sign_flip      -s Delta                  Xie, Koyejo and Gupta (UAI 2019, arXiv 1903.03936)
    scaling         s Delta                  Bagdasaryan et al. (AISTATS 2020, arXiv 1807.00459)
    label_flip      s Delta', trained on labels C - 1 - y   Fang et al. (USENIX Security 2020,
                                                            arXiv 1911.11815)
    random_noise    Gaussian noise of norm s |Delta|        Blanchard et al. (NeurIPS 2017)
    many_examples  -s Delta, and claims to have been trained on 10^9 images
    backdoor        s Delta'', trained on some images with a trigger and the target's label
                                                            (`backdoor.py`)
or a broken reply: NaN, infinity, wrong names, shapes or types, 64 MB of zeros, or none at all.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from flwr.app import Message, MessageType, MetricRecord, RecordDict
from numpy.typing import NDArray

from fedprompt.federation import client_app
from fedprompt.federation.sampling import attackers
from fedprompt.messages import ARRAYS, METRICS, Arrays, to_arrays, to_record
from fedprompt.methods.base import Tensors
from fedprompt.rng import generator
from fedprompt.simulation import backdoor
from fedprompt.workspace import Workspace

MANY = 10**9
"""The number of training images that a `many_examples` attacker claims."""
GIANT = 2**24
"""Length of each float32 tensor that a `giant` attacker sends: 64 MB."""


class Crashed(RuntimeError):
    """The error that a client of kind `crash` raises."""


@dataclass(frozen=True)
class Training:
    """What an attacker received in a round, and what it would send if it were honest.

    Attributes:
        received: the shared tensors that the server sent.
        trained: the shared tensors after honest training.
        scale: `attack.scale`.
        draw: the attacker's random generator for this round.
    """

    received: Arrays
    trained: Arrays
    scale: float
    draw: np.random.Generator

    def change(self) -> Arrays:
        """The change that training made to each tensor, as float64."""
        return {n: self.trained[n].astype(np.float64) - a for n, a in self.received.items()}

    def plus(self, factor: float) -> Arrays:
        """The received tensors plus `factor` times the change, as float32."""
        change = self.change()
        return {n: (a + factor * change[n]).astype(np.float32) for n, a in self.received.items()}

    def noise(self) -> Arrays:
        """The received tensors plus Gaussian noise, as float32.

        The noise's norm over all tensors together is `scale` times the norm of the change.
        """
        noise = {n: self.draw.standard_normal(a.shape) for n, a in self.received.items()}
        factor = self.scale * _norm(self.change()) / max(_norm(noise), 1e-30)
        return {n: (a + factor * noise[n]).astype(np.float32) for n, a in self.received.items()}


def _norm(arrays: Arrays) -> float:
    return float(np.sqrt(sum((a.astype(np.float64) ** 2).sum() for a in arrays.values())))


def _filled(value: float) -> Callable[[Training], Arrays]:
    return lambda t: {n: np.full(a.shape, value, np.float32) for n, a in t.trained.items()}


def _crash(training: Training) -> Arrays:
    raise Crashed("this client has crashed")


SPOILED: dict[str, Callable[[Training], Arrays]] = {
    "sign_flip": lambda t: t.plus(-t.scale),
    "scaling": lambda t: t.plus(t.scale),
    "label_flip": lambda t: t.plus(t.scale),
    "random_noise": Training.noise,
    "many_examples": lambda t: t.plus(-t.scale),
    "backdoor": lambda t: t.plus(t.scale),
    "nan": _filled(float("nan")),
    "inf": _filled(float("inf")),
    "wrong_name": lambda t: {f"{n}_": a for n, a in t.trained.items()},
    "wrong_shape": lambda t: {n: a[None] for n, a in t.trained.items()},
    "wrong_type": lambda t: {n: a.astype(np.float64) for n, a in t.trained.items()},
    "giant": lambda t: {n: np.zeros(GIANT, np.float32) for n in t.trained},
    "crash": _crash,
}
"""What an attacker of each kind sends. `attack.kind` is one of these keys or `none`.

`label_flip` and `backdoor` only scale here: what the attacker trains on is already changed."""


def handle(
    workspace: Workspace,
    clients: Sequence[int],
    messages: Sequence[Message],
    private: Mapping[int, Tensors],
) -> tuple[list[Message], dict[int, Tensors]]:
    """Answer as `client_app.handle` does, but corrupt what attackers send after training.

    Arguments and return values are those of `client_app.handle`. Attackers evaluate honestly, so
    that the reported accuracies are true. Those with a backdoor also measure how often it works.
    """
    config = workspace.config
    if client_app.asks_for_backdoor(messages[0]):
        return backdoor.measured(workspace, clients, messages, private), {}
    attacking = attackers(config.seed, workspace.possible_attackers, config.attack.share)
    bad = [k for k, client in enumerate(clients) if client in attacking]
    if messages[0].metadata.message_type != MessageType.TRAIN or not bad:
        return client_app.handle(workspace, clients, messages, private)
    # Attackers train in a group of their own, since some see other labels or other images.
    replies: dict[int, Message] = {}
    changed: dict[int, Tensors] = {}
    honest = [k for k in range(len(clients)) if k not in bad]
    seen_by_attackers, hidden = _as_attackers_see(
        workspace, [clients[k] for k in bad], [messages[k] for k in bad], private
    )
    for places, seen in ((honest, workspace), (bad, seen_by_attackers)):
        if not places:
            continue
        group = [clients[k] for k in places]
        answers, states = client_app.handle(seen, group, [messages[k] for k in places], private)
        replies |= dict(zip(places, answers, strict=True))
        changed |= states
    for k in bad:
        replies[k] = _spoiled(workspace, clients[k], messages[k], replies[k])
    for client, tensors in hidden.items():
        changed[client] = changed.get(client, {}) | tensors
    return [replies[k] for k in range(len(clients))], changed


def _as_attackers_see(
    workspace: Workspace,
    clients: Sequence[int],
    messages: Sequence[Message],
    stored: Mapping[int, Tensors],
) -> tuple[Workspace, dict[int, Tensors]]:
    """The workspace on which attackers train, and what they store beside their private tensors.

    Its labels are reversed for `label_flip`; for `backdoor`, some images have a trigger.
    """
    if workspace.config.attack.kind == "backdoor":
        return backdoor.poisoned(workspace, clients, messages, stored)
    if workspace.config.attack.kind != "label_flip":
        return workspace, {}
    # A shallow copy: backbone, method and feature tables are shared, only the labels differ.
    flipped = copy.copy(workspace)
    last = len(workspace.dataset.class_names) - 1
    labels_N: NDArray[np.int64] = last - workspace.dataset.labels_N
    flipped.dataset = replace(workspace.dataset, labels_N=labels_N)
    return flipped, {}


def _spoiled(workspace: Workspace, client: int, message: Message, reply: Message) -> Message:
    """Turn an attacker's honest reply into the reply that it sends."""
    if reply.has_error():
        return reply
    config = workspace.config
    server_round = client_app.server_round(message)
    training = Training(
        to_arrays(message.content[ARRAYS]),  # type: ignore[arg-type]
        to_arrays(reply.content[ARRAYS]),  # type: ignore[arg-type]
        config.attack.scale,
        generator(config.seed, "attack", server_round, client),
    )
    kind = config.attack.kind
    metrics = reply.content[METRICS]
    assert isinstance(metrics, MetricRecord)
    if kind == "many_examples":
        # Without screening, an average weighted by examples would follow this client almost alone.
        metrics["num-examples"] = MANY
    arrays = to_record(SPOILED[kind](training))
    return Message(RecordDict({ARRAYS: arrays, METRICS: metrics}), reply_to=message)
