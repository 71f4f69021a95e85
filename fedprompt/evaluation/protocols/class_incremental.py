"""Class-incremental learning: accuracy after every session, and what is forgotten.

Sources: the measures are those of Riemannian Walk for Incremental Learning (Chaudhry et al., ECCV
2018, arXiv 1801.10112) and of few-shot class-incremental learning, as in Image-Object-Specific
Prompt Learning (Yoon et al., arXiv 2309.02833). With a_{s,j} the accuracy after session s on test
images of session j's classes, where the names of all classes seen so far compete:

    seen        on all test images of sessions 1 .. s
    old, new    on those of sessions 1 .. s - 1, and of session s; and their harmonic mean
    forgetting  mean over j < s of (max over j <= r < s of a_{r,j}) - a_{s,j}; it can be negative

The sessions themselves are `fedprompt/data/partition/sessions.py`. The global model is measured on
the server's test images in every evaluated round, and each session's last round counts. Personal
models are measured in every round anyway, on the client's own test images of classes seen so far.
Any method whose prompts can be used with further class names can be trained so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedprompt.data.partition.sessions import bounds
from fedprompt.data.partition.stages import stage_of
from fedprompt.evaluation.metrics import harmonic_mean
from fedprompt.evaluation.predictions import by_group, hits
from fedprompt.evaluation.protocol import Finished, NoOptions, Part, Reported
from fedprompt.methods.base import Method, Tensors
from fedprompt.methods.registry import zero_shot
from fedprompt.reports.figure import ACCURACY, MODEL_COLOURS, Axis, Curve, Figure, Lines, palette
from fedprompt.reports.format import Table, percent
from fedprompt.scoring import encode_global

if TYPE_CHECKING:
    from fedprompt.reports.run_data import RunData
    from fedprompt.workspace import Workspace

MEASURES = ("seen", "old", "new", "harmonic", "forgetting")


class ClassIncremental(Reported):
    """Accuracy on old and new classes after every session."""

    name = "class_incremental"
    title = "Class-incremental learning"
    caption = "Accuracy after every session, with the names of all classes seen so far competing."
    Options = NoOptions
    one_of = ("global", "personalised")
    needs_new_names = True
    simulation_only = "asks only clients that have images of a session's classes to train"

    @classmethod
    def suits(cls, method: Method) -> bool:
        """Whether the method learns, and goes on with further class names."""
        return super().suits(method) and method.trainable and not method.config.refines

    def measure_round(
        self, workspace: Workspace, shared: Tensors, line: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        """The counts of the global model by session; see `Protocol.measure_round`."""
        session = stage_of(self.config, max(1, line["round"])).number
        present = workspace.at(line["round"])
        entry: dict[str, Any] = {"session": session}
        if present.method.has_global:
            encoded = encode_global(present.method, shared, present.memo)
            entry |= self._counts(workspace, present, present.method, encoded, session)
        return entry

    def _counts(
        self,
        workspace: Workspace,
        present: Workspace,
        method: Method,
        encoded: Tensors,
        session: int,
    ) -> dict[str, list[int]]:
        """Numbers of test images and of right answers by session, 1 .. `session`."""
        inputs_N, labels_N = present.server_test()
        found_N = hits(method, encoded, inputs_N, labels_N)
        ends = [end for _, end in bounds(self.config.partition, len(workspace.task.class_names))]
        group_N = np.searchsorted(np.array(ends), labels_N.numpy(), side="right")
        tested, correct = by_group(found_N, group_N.astype(np.int64), session)
        return {"tested": tested.tolist(), "correct": correct.tolist()}

    def measure(self, run: Finished) -> dict[str, Any]:
        """What every session's last round has measured, and zero-shot CLIP beside it."""
        workspace, rounds = run.workspace, self.config.federation.rounds
        names = workspace.task.class_names
        each = rounds // self.config.partition.sessions
        by_round = {line["round"]: line for line in run.rounds}
        lines, plain, personal = [], [], []
        for session in range(1, self.config.partition.sessions + 1):
            line = by_round[session * each]
            lines.append(line["protocols"][self.name])
            personal.append((line.get("personal") or {}).get("mean"))
            present = workspace.at(session * each)
            frozen = zero_shot(workspace.clip, present.task)
            with torch.no_grad():
                encoded = encode_global(frozen, {})
                plain.append(self._counts(workspace, present, frozen, encoded, session))
        models = {"zero-shot": measures(plain)}
        if workspace.method.has_global:
            models["global"] = measures(lines)
        return {
            "classes": [list(names[a:b]) for a, b in bounds(self.config.partition, len(names))],
            "models": models,
            "personal": personal,
        }

    @classmethod
    def table(cls, part: Part) -> Table:
        """One row per session and model."""
        return _table(cls.title, [("", part)])

    @classmethod
    def figure(cls, part: Part, run: RunData) -> Figure:
        """Accuracy on all classes seen, and on the old ones, over sessions."""
        curves = []
        for model, rows in part["models"].items():
            curves.append(_curve(model, MODEL_COLOURS[model], [row["seen"] for row in rows]))
            old = _curve(f"{model}, old classes", MODEL_COLOURS[model], [r["old"] for r in rows])
            curves.append(Curve(name=old.name, color=old.color, x=old.x, y=old.y, dashed=True))
        curves.append(_curve("personal", MODEL_COLOURS["personal"], part["personal"]))
        return _figure(cls.name, cls.title, cls.caption, curves)

    @classmethod
    def compare(cls, runs: Sequence[tuple[str, Part]]) -> tuple[Table, Figure]:
        """Accuracy on all classes seen, of every run."""
        curves = []
        for i, (name, part) in enumerate(runs):
            rows = part["models"].get("global")
            seen = part["personal"] if rows is None else [row["seen"] for row in rows]
            curves.append(_curve(name, palette(i), seen))
        return _table(cls.title, runs), _figure(cls.name, cls.title, cls.caption, curves)


def measures(counts: Sequence[Mapping[str, Sequence[int]]]) -> list[dict[str, float | None]]:
    """The measures of one model after every session.

    Args:
        counts: per session s, numbers of images `tested` and `correct` of sessions 1 .. s.

    Returns:
        Per session, an accuracy or difference for each of `MEASURES`; None where there is no image
        or no earlier session.
    """
    rows: list[dict[str, float | None]] = []
    best: list[float | None] = []
    for line in counts:
        tested, correct = line["tested"], line["correct"]
        each = [_share(c, n) for c, n in zip(correct, tested, strict=True)]
        old, new = _share(sum(correct[:-1]), sum(tested[:-1])), each[-1]
        lost = [b - a for b, a in zip(best, each, strict=False) if b is not None and a is not None]
        rows.append(
            {
                "seen": _share(sum(correct), sum(tested)),
                "old": old,
                "new": new,
                "harmonic": None if old is None or new is None else harmonic_mean(old, new),
                "forgetting": float(np.mean(lost)) if lost else None,
            }
        )
        best = [
            max((x for x in pair if x is not None), default=None)
            for pair in zip([*best, None], each, strict=True)
        ]
    return rows


def _share(correct: int, tested: int) -> float | None:
    return correct / tested if tested else None


def _curve(name: str, color: str, values: Sequence[float | None]) -> Curve:
    known = [(s, value) for s, value in enumerate(values, 1) if value is not None]
    return Curve(name=name, color=color, x=[s for s, _ in known], y=[v for _, v in known])


def _figure(name: str, title: str, caption: str, curves: Sequence[Curve]) -> Figure:
    axis = Axis(label="Session", noun="after session", format="count", low=1)
    panel = Lines(curves=[curve for curve in curves if curve.x], x=axis, y=ACCURACY)
    return Figure(name=name, title=title, caption=caption, panels=[panel])


def _table(title: str, runs: Sequence[tuple[str, Part]]) -> Table:
    rows = []
    for name, part in runs:
        seen = np.cumsum([len(names) for names in part["classes"]])
        for model, sessions in part["models"].items():
            for s, row in enumerate(sessions):
                own = percent(part["personal"][s]) if model != "zero-shot" else "-"
                label = " ".join(filter(None, (f"{s + 1}", name and f"({name})")))
                cells = (percent(row[measure]) for measure in MEASURES)
                rows.append((label, model, str(seen[s]), *cells, own))
    note = (
        "Server's test images; the names of all classes seen so far compete. Old: classes of "
        "earlier sessions; new: of this one. Forgetting: best earlier accuracy on the classes of "
        "an earlier session minus the present one, mean over these sessions. Personal: mean over "
        "clients, own test images of the classes seen so far."
    )
    columns = ("session", "model", "classes", *MEASURES, "personal")
    return Table(title, columns, tuple(rows), note)
