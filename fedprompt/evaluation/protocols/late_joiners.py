"""Late joiners: how fast clients that join after training catch up with the shared prompts.

Sources: evaluation on clients that took no part in training (What Do We Mean by Generalization in
Federated Learning?, Yuan et al., ICLR 2022, arXiv 2110.14216), and personalisation of a shared
model in a few local steps (Improving Federated Learning Personalization via Model Agnostic Meta
Learning, Jiang et al., 2019, arXiv 1909.12488).

`partition.late_clients` clients are never asked to train. After the last round, each of them
receives what the server sends, starts its private tensors anew, and trains for n steps on its own
images, as it would in a round: `joined`. It is compared with the same method and the same steps
from the untrained prompts, `alone`, and with zero-shot CLIP, on the client's own test images. No
step is zero-shot use of the shared prompts. Each n is a training of its own from the same start,
with the same batches, so a curve is one trajectory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fedprompt.config.fields import option
from fedprompt.errors import UserError
from fedprompt.evaluation.protocol import Finished, Numbers, Part, Reported
from fedprompt.messages import MAX_EXAMPLES, Ranges
from fedprompt.methods.base import Method, Tensors, takes_steps
from fedprompt.methods.registry import zero_shot
from fedprompt.reports.figure import ACCURACY, Axis, Curve, Figure, Lines, palette
from fedprompt.reports.format import Table, percent, percent_spread
from fedprompt.scoring import score_personal
from fedprompt.statistics import sample_std
from fedprompt.training import train_clients

if TYPE_CHECKING:
    from fedprompt.reports.run_data import RunData
    from fedprompt.workspace import Workspace

STARTS = {"joined": "own", "alone": "alone"}
"""What late clients start from, and the colours of the curves."""
ZERO_SHOT = "zero-shot"


@dataclass(frozen=True)
class LateJoinersOptions:
    """How long late clients train."""

    steps: list[int] = option([0, 1, 2, 5, 10, 20], "local steps after which they are tested")
    lr: float | None = option(None, "learning rate of all steps; null = training.lr", gt=0)

    def check(self) -> None:
        """Refuse steps that are negative or named twice."""
        if not self.steps or min(self.steps) < 0 or len(set(self.steps)) < len(self.steps):
            raise UserError(f"'steps' is {self.steps}; name each number once, from 0.")


class LateJoiners(Reported):
    """Accuracy of clients that join after training, over their local steps."""

    name = "late_joiners"
    title = "Late joiners"
    caption = "Own test images of clients that took no part in training; mean over these clients."
    Options = LateJoinersOptions
    asks_clients = True
    simulation_only = "trains clients while they are tested"
    options: LateJoinersOptions

    @classmethod
    def suits(cls, method: Method) -> bool:
        """Whether clients take local steps; see `Protocol.suits`."""
        return super().suits(method) and method.trainable and takes_steps(method)

    def open(self, workspace: Workspace) -> None:
        """Check that somebody joins late, and that the method trains; see `Protocol.open`."""
        if not workspace.late:
            raise UserError(
                "protocol late_joiners needs clients that join late; set partition.late_clients=2."
            )
        if not self.suits(workspace.method):
            raise UserError(
                f"protocol late_joiners needs local steps, which method '{workspace.method.name}' "
                "does not take; use another method."
            )

    def measure_clients(
        self,
        workspace: Workspace,
        clients: Sequence[int],
        shared: Sequence[Tensors],
        private: Sequence[Tensors],
    ) -> list[Numbers]:
        """Correct answers of the late clients of a block; zeros for the others."""
        numbers: list[Numbers] = [dict.fromkeys(self._names(), 0) for _ in clients]
        able = set(workspace.partition.able_to_train(self.config.method.learns_without_labels))
        rows = [k for k, client in enumerate(clients) if client in workspace.late & able]
        if not rows:
            return numbers
        late = [clients[k] for k in rows]
        method, seed = workspace.method, self.config.seed
        untrained = method.init_shared(seed) | method.init_extras(seed)
        tests = [workspace.test_data(client) for client in late]
        starts = {"joined": [shared[k] for k in rows], "alone": [untrained] * len(late)}
        for start, received in starts.items():
            for steps in self.options.steps:
                models = self._trained(workspace, late, received, steps)
                scores, _ = score_personal(method, *models, tests)
                for k, score in zip(rows, scores, strict=True):
                    numbers[k][f"{start}-{steps}"] = score.correct
        plain = zero_shot(workspace.clip, workspace.task)
        scores, _ = score_personal(plain, [{}] * len(late), [{}] * len(late), tests)
        for k, score in zip(rows, scores, strict=True):
            numbers[k] |= {ZERO_SHOT: score.correct, "tested": score.tested}
        return numbers

    def client_numbers(self, workspace: Workspace) -> Ranges:
        """Counts of correct answers; see `Protocol.client_numbers`."""
        ranges: dict[str, tuple[float, float | str]] = {"tested": (0, MAX_EXAMPLES)}
        return ranges | {name: (0, "tested") for name in self._names() if name != "tested"}

    def measure(self, run: Finished) -> dict[str, Any]:
        """Mean accuracies over late clients, by start and steps."""
        late = {c: n for c, n in run.clients.items() if c in run.workspace.late and n["tested"]}

        def spread(name: str) -> dict[str, float | None]:
            accuracies = [n[name] / n["tested"] for n in late.values()]
            if not accuracies:
                return {"mean": None, "std": None}
            return {"mean": float(np.mean(accuracies)), "std": sample_std(accuracies)}

        rows = [
            {"steps": steps, **{start: spread(f"{start}-{steps}") for start in STARTS}}
            for steps in sorted(self.options.steps)
        ]
        return {"clients": sorted(late), "zero_shot": spread(ZERO_SHOT), "rows": rows}

    @classmethod
    def table(cls, part: Part) -> Table:
        """One row per number of steps."""
        return _table(cls.title, [("", part)])

    @classmethod
    def figure(cls, part: Part, run: RunData) -> Figure:
        """Accuracy over steps from both starts, and zero-shot."""
        curves = [_curve(start, color, part, start) for start, color in STARTS.items()]
        last = part["rows"][-1]["steps"]
        if (flat := part["zero_shot"]["mean"]) is not None:
            curves.append(
                Curve(name=ZERO_SHOT, color="bars", x=[0, last], y=[flat, flat], dashed=True)
            )
        return _figure(cls.name, cls.caption, curves)

    @classmethod
    def compare(cls, runs: Sequence[tuple[str, Part]]) -> tuple[Table, Figure]:
        """Both curves of every run."""
        curves = [
            _curve(f"{name}, {start}", palette(i), part, start, dashed=start == "alone")
            for i, (name, part) in enumerate(runs)
            for start in STARTS
        ]
        return _table(cls.title, runs), _figure(cls.name, cls.caption, curves)

    def _names(self) -> list[str]:
        curves = [f"{start}-{steps}" for start in STARTS for steps in self.options.steps]
        return ["tested", ZERO_SHOT, *curves]

    def _trained(
        self, workspace: Workspace, clients: Sequence[int], received: Sequence[Tensors], steps: int
    ) -> tuple[list[Tensors], list[Tensors]]:
        """Shared and private tensors of clients after some steps from what they have received."""
        private = [workspace.start_private(client) for client in clients]
        if steps == 0:
            return list(received), private
        data = [workspace.train_data(client) for client in clients]
        training = self.config.training
        shortest = min(math.ceil(len(d) / training.batch_size) for d in data)
        # Enough epochs for everyone, at one learning rate: the run's schedule is at its end.
        training = replace(
            training,
            local_epochs=math.ceil(steps / shortest),
            schedule="constant",
            lr=self.options.lr or training.lr,
        )
        last = max(1, self.config.federation.rounds)
        results = train_clients(
            workspace.method,
            received,
            private,
            data,
            training,
            seed=self.config.seed,
            server_round=last,
            rounds=last,
            max_steps=steps,
        )
        shared = [start | result.shared for start, result in zip(received, results, strict=True)]
        return shared, [result.private for result in results]


def _curve(name: str, color: str, part: Part, start: str, *, dashed: bool = False) -> Curve:
    rows = [row for row in part["rows"] if row[start]["mean"] is not None]
    x, y = [row["steps"] for row in rows], [row[start]["mean"] for row in rows]
    return Curve(name=name, color=color, x=x, y=y, dashed=dashed)


def _figure(name: str, caption: str, curves: Sequence[Curve]) -> Figure:
    axis = Axis(label="Local steps after joining", noun="after", format="count", low=0)
    panel = Lines(curves=curves, x=axis, y=ACCURACY)
    return Figure(name=name, title="Accuracy of late joiners", caption=caption, panels=[panel])


def _table(title: str, runs: Sequence[tuple[str, Part]]) -> Table:
    rows = tuple(
        (
            f"{row['steps']} ({name})" if name else str(row["steps"]),
            *(percent_spread(row[start]["mean"], row[start]["std"]) for start in STARTS),
            percent(part["zero_shot"]["mean"]),
        )
        for name, part in runs
        for row in part["rows"]
    )
    note = (
        "Clients that took no part in training, own test images, mean ± std over these clients. "
        "Joined: from the shared prompts; alone: from untrained prompts, as many steps."
    )
    return Table(title, ("steps", *STARTS, ZERO_SHOT), rows, note)
