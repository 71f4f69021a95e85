"""FedBuff: clients train without waiting for each other, and the server steps when K have replied.

Source: Federated Learning with Buffered Asynchronous Aggregation (Nguyen et al., AISTATS 2022,
arXiv 2106.06639), algorithm 1. A client i that was sent x^s uploads its change D_i whenever it is
done; the server adds (1 + t)^-a D_i to its buffer, t being the number of steps since x^s, and
aggregates when K changes are in it. As soon as a client is done, another one starts, from the
present x.

Time is that of the simulated clock (`clock.py`): the order of replies follows from the seed, and
not from the machines that compute them. A client is trained when its reply arrives, from the
tensors that it was sent then: nobody else changes what it holds in between, and the K replies of a
step are computed in one exchange per version, in blocks, on whatever grid. Which clients are in
flight, and what they were sent, is part of the checkpoint.

One step is a round of the run, so schedules, evaluation and reports count steps. With zero delays
and a buffer as large as the sample, every reply is fresh and the run equals FedAvg bit for bit.

How we differ: the strategy aggregates x + (1 + t)^-a D_i in place of the uploads, so any strategy
that keeps nothing about single clients can be used, and FedAvg weighs clients by their images
unless `strategy.weights=uniform`. The server's learning rate is that of a strategy (FedAdam,
FedAvgM). A client takes part in a step at most once: it would train from the same tensors again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from torch import Tensor

from fedprompt.errors import UserError
from fedprompt.federation.checkpoint import Checkpoint
from fedprompt.federation.grid import CountingGrid
from fedprompt.federation.presence import DROPPED_OUT
from fedprompt.federation.sampling import choose
from fedprompt.federation.server_app import Federation
from fedprompt.messages import Arrays, Exchanged, Traffic, Update, to_arrays, to_record
from fedprompt.workspace import Workspace


@dataclass(frozen=True, order=True)
class Task:
    """A client that trains. Tasks are ordered as their replies arrive.

    Attributes:
        done_s: when its reply arrives, in simulated seconds since the run began.
        client: client id.
        server_round: the step in which it was sent the shared tensors.
        seconds: how long it takes.
    """

    done_s: float
    client: int
    server_round: int
    seconds: float


@dataclass
class Flight:
    """Who trains at present, and from what.

    Attributes:
        now: simulated seconds since the run began.
        tasks: the clients that train.
        versions: the shared tensors that were sent in each step, as long as somebody needs them.
    """

    now: float = 0.0
    tasks: list[Task] = field(default_factory=list)
    versions: dict[int, ArrayRecord] = field(default_factory=dict)

    def arrivals(self) -> list[Task]:
        """Take out the tasks that are done next, at one and the same time, and go to that time."""
        self.now = min(self.tasks).done_s
        arrived = sorted(task for task in self.tasks if task.done_s == self.now)
        self.tasks = [task for task in self.tasks if task.done_s != self.now]
        return arrived

    def forget_versions(self) -> None:
        """Drop the tensors from which nobody trains any more."""
        needed = {task.server_round for task in self.tasks}
        self.versions = {r: arrays for r, arrays in self.versions.items() if r in needed}

    def tensors(self) -> dict[str, Tensor]:
        """Everything as named tensors, for a checkpoint."""
        pairs = [[task.client, task.server_round] for task in self.tasks]
        times = [[task.done_s, task.seconds] for task in self.tasks]
        named = {
            "now": torch.tensor(self.now, dtype=torch.float64),
            "tasks": torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2),
            "times": torch.tensor(times, dtype=torch.float64).reshape(-1, 2),
        }
        for server_round, arrays in self.versions.items():
            for name, array in to_arrays(arrays).items():
                named[f"{server_round}/{name}"] = torch.from_numpy(array)
        return named

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor]) -> Flight:
        """Restore what `tensors` returned."""
        named = dict(tensors)
        now, tasks, times = (named.pop(name) for name in ("now", "tasks", "times"))
        versions: dict[int, Arrays] = {}
        for key, tensor in named.items():
            server_round, _, name = key.partition("/")
            versions.setdefault(int(server_round), {})[name] = tensor.numpy()
        return cls(
            float(now),
            [
                Task(done_s, client, server_round, seconds)
                for (client, server_round), (done_s, seconds) in zip(
                    tasks.tolist(), times.tolist(), strict=True
                )
            ],
            {server_round: to_record(arrays) for server_round, arrays in versions.items()},
        )


class BufferedFederation(Federation):
    """A `Federation` whose rounds are the steps of FedBuff.

    Args:
        workspace: the server's own data, CLIP and method.
        grid: sends messages to the clients and returns their replies.

    Attributes:
        flight: who trains at present, and from what.

    Raises:
        UserError: the method cannot be used without rounds.
    """

    def __init__(self, workspace: Workspace, grid: CountingGrid) -> None:
        super().__init__(workspace, grid)
        if self.strategy.extras:
            raise UserError(
                f"asynchronous: method '{self.method.name}' sends clients something of the present "
                "round beside the prompts; use another method."
            )
        if self.method.trainable and not self.takes_steps:
            raise UserError(
                f"asynchronous: clients of method '{self.method.name}' take no steps from what "
                "they are sent, so what they send is no change that could be added later; use "
                "another method."
            )
        self.flight = Flight()
        self.concurrency = self.config.asynchronous.concurrency or workspace.round_size

    def train_round(self, server_round: int) -> dict[str, Any]:
        """Take one step of the server.

        Args:
            server_round: the step, from 1.

        Returns:
            The training part of the step's line in `metrics.jsonl`. `clients` counts those whose
            replies, or whose silence, belong to this step.
        """
        # The tensors that have been evaluated so far will not be evaluated again.
        self.workspace.memo.clear()
        began = self.flight.now
        arrived, absent = self._fill_buffer(server_round)
        self.strategy.shared = to_arrays(self.arrays)
        self.strategy.sampled = sorted(task.client for task in (*arrived, *absent))
        exchanged = self._exchange(server_round, arrived, absent)
        arrays = self.strategy.finish_round(server_round, exchanged)
        if arrays is not None:
            self.arrays = arrays
        self.flight.forget_versions()
        self.rejected += len(exchanged.dropped)
        self.asked.update(self.strategy.sampled)
        staleness = [server_round - task.server_round for task in arrived]
        return self._training_line(server_round, exchanged) | {
            "clock": {
                "seconds": self.flight.now - began,
                "clients": {
                    str(t.client): t.seconds for t in sorted(arrived, key=attrgetter("client"))
                },
            },
            "asynchronous": {
                "mean_staleness": float(np.mean(staleness)) if staleness else None,
                "max_staleness": max(staleness, default=None),
                "training": len(self.flight.tasks),
            },
        }

    def _fill_buffer(self, server_round: int) -> tuple[list[Task], list[Task]]:
        """Let time pass until the buffer is full, or nobody trains any more.

        Returns:
            The tasks whose replies are in the buffer, and those whose clients have dropped out.
        """
        size, flight = self.config.asynchronous.buffer, self.flight
        arrived: list[Task] = []
        absent: list[Task] = []
        starts = 0
        self._begin(server_round, (), starts)
        while flight.tasks and len(arrived) < size:
            for task in flight.arrivals():
                if self.presence.trace.drops_out(task.server_round, task.client):
                    absent.append(task)
                elif len(arrived) < size:
                    arrived.append(task)
                else:
                    # It has come at the same time as the last one, and opens the next buffer.
                    flight.tasks.append(task)
            if len(arrived) < size:
                # Those who take their places start after all replies of the same moment.
                starts += 1
                self._begin(server_round, (*arrived, *absent), starts)
        return arrived, absent

    def _begin(self, server_round: int, ended: Sequence[Task], starts: int) -> None:
        """Send the present shared tensors to as many clients as may train at a time.

        Args:
            server_round: the step, whose number the messages carry.
            ended: the tasks that have ended in this step; their clients wait for the next one.
            starts: how often clients were started in this step before.
        """
        flight, known = self.flight, self.strategy.known
        busy = {task.client for task in (*flight.tasks, *ended)}
        present = self.presence.trace.present(server_round, known.trainable)
        idle = [client for client in present if client not in busy]
        count = max(0, self.concurrency - len(flight.tasks))
        # The first draw of a step is that of a round, see `sampling.draw_clients`.
        purpose = ("sample", server_round, *((starts,) if starts else ()))
        chosen = choose(idle, count, self.config.seed, *purpose)
        for client, seconds in self._seconds(server_round, chosen).items():
            flight.tasks.append(Task(flight.now + seconds, client, server_round, seconds))
            flight.versions[server_round] = self.arrays

    def _exchange(
        self, server_round: int, arrived: Sequence[Task], absent: Sequence[Task]
    ) -> Exchanged:
        """Train the clients of a step, and check and scale what they reply."""
        asked: list[Message] = []
        replies: list[Message] = []
        traffic = Traffic()
        self.grid.silent = {task.client for task in absent}
        tasks = sorted((*arrived, *absent), key=attrgetter("client"))
        # Clients train with the tensors, the learning rate and the draws of the step in which they
        # were asked: one exchange per version.
        for version in sorted({task.server_round for task in tasks}):
            clients = [task.client for task in tasks if task.server_round == version]
            messages = self.strategy.training_messages(
                version, clients, self.flight.versions[version], ConfigRecord()
            )
            answers, sent = self._send(messages)
            asked += messages
            replies += answers
            traffic = Traffic(traffic.down + sent.down, traffic.up + sent.up)
        exchanged = self.strategy.screen(server_round, asked, replies)
        versions = {task.client: task.server_round for task in arrived}
        updates = [
            self._scaled(update, server_round, versions[update.client])
            for update in exchanged.updates
        ]
        reasons = {task.client: DROPPED_OUT for task in sorted(absent, key=attrgetter("client"))}
        return replace(exchanged, updates=updates, traffic=traffic).without(reasons)

    def _scaled(self, update: Update, server_round: int, version: int) -> Update:
        """An update as the strategy aggregates it: the present tensors plus the scaled change."""
        staleness = server_round - version
        if staleness == 0:
            return update
        weight = math.pow(1 + staleness, -self.config.asynchronous.staleness_exponent)
        start = to_arrays(self.flight.versions[version])
        arrays: Arrays = {}
        for name, now in self.strategy.shared.items():
            change = update.arrays[name].astype(np.float64) - start[name]
            arrays[name] = (now + weight * change).astype(np.float32)
        return replace(update, arrays=arrays)

    def checkpoint(self, server_round: int, totals: dict[str, int]) -> Checkpoint:
        """Everything that a resumed run needs; see `Federation.checkpoint`."""
        whole = super().checkpoint(server_round, totals)
        counts = [self.asked[client] for client in range(self.workspace.num_clients)]
        return replace(whole, flight=self.flight.tensors() | {"asked": torch.tensor(counts)})

    def restore(self, checkpoint: Checkpoint) -> None:
        """Return to the state of a checkpoint; see `Federation.restore`."""
        super().restore(checkpoint)
        tensors = dict(checkpoint.flight)
        self.asked.clear()
        self.asked.update(dict(enumerate(tensors.pop("asked").tolist())))
        self.flight = Flight.read(tensors)


def open_federation(workspace: Workspace, grid: CountingGrid) -> Federation:
    """The federation of a simulation: with rounds, or with FedBuff's steps if the config asks.

    Args:
        workspace: the server's own data, CLIP and method.
        grid: sends messages to the clients and returns their replies.

    Raises:
        UserError: as of `Federation` and `BufferedFederation`.
    """
    buffered = workspace.config.asynchronous.enabled
    return (BufferedFederation if buffered else Federation)(workspace, grid)
