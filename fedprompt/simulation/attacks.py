"""Malicious and broken clients in a simulation.

`handle` answers a block's messages as `client_app.handle` does, but spoils what the attackers
send: a fixed share of the clients, drawn from the seed. A grid takes it in place of the honest one
where `attack.kind` asks for it; clients of a real deployment never run it.

With Delta what an attacker's honest training changes and s = `attack.scale`, it sends the received
tensors plus
    sign_flip      -s Delta                  Xie, Koyejo and Gupta (UAI 2019, arXiv 1903.03936)
    scaling         s Delta                  Bagdasaryan et al. (AISTATS 2020, arXiv 1807.00459)
    label_flip      s Delta', trained on labels C - 1 - y   Fang et al. (USENIX Security 2020,
                                                            arXiv 1911.11815)
    random_noise    Gaussian noise of norm s |Delta|        Blanchard et al. (NeurIPS 2017)
    many_examples  -s Delta, and says that it was trained on a thousand million images
or something broken: NaN, infinity, another name, shape or type, a reply of 64 MB, or none.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from flwr.app import Message, MessageType, MetricRecord, RecordDict
from numpy.typing import NDArray

from fedprompt.federation import client_app
from fedprompt.messages import ARRAYS, METRICS, Arrays, to_arrays, to_record
from fedprompt.methods.base import Tensors
from fedprompt.rng import generator
from fedprompt.workspace import Workspace

MANY = 10**9
"""Images that `many_examples` claims."""
GIANT = 2**24
"""Numbers of a tensor that `giant` sends, 64 MB."""


class Crashed(RuntimeError):
    """What a client of kind `crash` dies of."""


@dataclass(frozen=True)
class Training:
    """What an attacker has received and what it would send if it were honest."""

    received: Arrays
    trained: Arrays
    scale: float
    draw: np.random.Generator

    def change(self) -> Arrays:
        """What training has changed, float64."""
        return {n: self.trained[n].astype(np.float64) - a for n, a in self.received.items()}

    def plus(self, factor: float) -> Arrays:
        """The received tensors plus `factor` times the change of training."""
        change = self.change()
        return {n: (a + factor * change[n]).astype(np.float32) for n, a in self.received.items()}

    def noise(self) -> Arrays:
        """The received tensors plus noise of norm `scale` times that of the change."""
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
    "nan": _filled(float("nan")),
    "inf": _filled(float("inf")),
    "wrong_name": lambda t: {f"{n}_": a for n, a in t.trained.items()},
    "wrong_shape": lambda t: {n: a[None] for n, a in t.trained.items()},
    "wrong_type": lambda t: {n: a.astype(np.float64) for n, a in t.trained.items()},
    "giant": lambda t: {n: np.zeros(GIANT, np.float32) for n in t.trained},
    "crash": _crash,
}
"""What an attacker of each kind sends; `attack.kind` is one of them or `none`."""


def attackers(seed: int, clients: int, share: float) -> frozenset[int]:
    """The clients that attack, the same in every round."""
    count = round(share * clients)
    draw = generator(seed, "attackers")
    return frozenset(int(c) for c in draw.choice(clients, size=count, replace=False))


def handle(
    workspace: Workspace,
    clients: Sequence[int],
    messages: Sequence[Message],
    private: Mapping[int, Tensors],
) -> tuple[list[Message], dict[int, Tensors]]:
    """`client_app.handle`, but attackers spoil what they send after training."""
    config = workspace.config
    chosen = attackers(config.seed, workspace.num_clients, config.attack.share)
    bad = [k for k, client in enumerate(clients) if client in chosen]
    if messages[0].metadata.message_type != MessageType.TRAIN or not bad:
        return client_app.handle(workspace, clients, messages, private)
    replies: dict[int, Message] = {}
    changed: dict[int, Tensors] = {}
    honest = [k for k in range(len(clients)) if k not in bad]
    for places, seen in ((honest, workspace), (bad, _as_attackers_see(workspace))):
        if not places:
            continue
        some = [clients[k] for k in places]
        answers, own = client_app.handle(seen, some, [messages[k] for k in places], private)
        replies |= dict(zip(places, answers, strict=True))
        changed |= own
    for k in bad:
        replies[k] = _spoiled(workspace, clients[k], messages[k], replies[k])
    return [replies[k] for k in range(len(clients))], changed


def _as_attackers_see(workspace: Workspace) -> Workspace:
    """The workspace, with the labels turned round where the attack is to flip them."""
    if workspace.config.attack.kind != "label_flip":
        return workspace
    flipped = copy.copy(workspace)
    last = len(workspace.dataset.class_names) - 1
    labels_N: NDArray[np.int64] = last - workspace.dataset.labels_N
    flipped.dataset = replace(workspace.dataset, labels_N=labels_N)
    return flipped


def _spoiled(workspace: Workspace, client: int, message: Message, reply: Message) -> Message:
    """An attacker's reply, made of the honest one."""
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
        metrics["num-examples"] = MANY
    arrays = to_record(SPOILED[kind](training))
    return Message(RecordDict({ARRAYS: arrays, METRICS: metrics}), reply_to=message)
