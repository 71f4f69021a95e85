"""Base-to-new generalisation: prompts learned on some classes are tested on the names of others.

Sources: Conditional Prompt Learning for Vision-Language Models (Zhou et al., CVPR 2022, arXiv
2203.05557), section 4.1: the first half of the classes in label order (rounded up) are base
classes, the rest are new; each half is tested with its own class names only. The federated form is
that of FedTPG (Qiu et al., ICLR 2024, arXiv 2310.06123) and FedPGP (Cui et al., ICML 2024, arXiv
2405.09771): base classes are distributed over the clients by the experiment's partition, and no
client holds images of new classes.

All models, personal ones included, are tested on the server's test images of the base classes and
on the test images of the new classes. The results of personal models are means over clients; their
harmonic mean is computed from these means. `all_classes` adds the harder test in which the names of
all classes compete.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import Tensor

from fedprompt.backbone.memo import Memo
from fedprompt.config.fields import option
from fedprompt.data.dataset import ImageDataset
from fedprompt.data.features.inputs import Inputs
from fedprompt.data.held_out import HeldOut, hold_out_classes
from fedprompt.errors import UserError
from fedprompt.evaluation.metrics import harmonic_mean
from fedprompt.evaluation.protocol import Finished, Numbers, Part, Reported
from fedprompt.messages import Ranges
from fedprompt.methods.base import Method, Task, Tensors
from fedprompt.methods.registry import zero_shot
from fedprompt.reports.figure import Figure
from fedprompt.reports.figure_parts import model_bars
from fedprompt.reports.format import Table, percent, percent_spread
from fedprompt.rng import generator
from fedprompt.scoring import encode_global, encode_personal, score_global, score_models
from fedprompt.statistics import sample_std

if TYPE_CHECKING:
    from fedprompt.reports.run_data import RunData
    from fedprompt.workspace import Workspace

NO_GLOBAL = "the method has no global model"


@dataclass(frozen=True)
class BaseToNewOptions:
    """Which classes are base, and which class names compete in a test."""

    base: Literal["first", "random"] = option(
        "first", "base classes: first in label order (CoCoOp's), or a draw with the run's seed"
    )
    base_share: float = option(0.5, "share of base classes, rounded up", gt=0, lt=1)
    all_classes: bool = option(False, "also test both halves with all class names competing")


@dataclass(frozen=True)
class _Test:
    """One test: images (n, ...), their labels (n,), and the task with the competing class names."""

    name: str
    task: Task
    inputs_N: Inputs
    labels_N: Tensor


class BaseToNew(Reported):
    """Tests the models on classes that no client holds."""

    name = "base_to_new"
    title = "Base-to-new generalisation"
    caption = "Accuracy on classes that clients hold (base) and on classes that none holds (new)."
    Options = BaseToNewOptions
    asks_clients = True
    needs_new_names = True
    options: BaseToNewOptions

    @property
    def holds_out(self) -> Literal["classes"]:
        """The new classes are held out."""
        return "classes"

    def hold_out(self, dataset: ImageDataset) -> tuple[ImageDataset, HeldOut]:
        """Hold out the new classes; see `Protocol.hold_out`."""
        classes = len(dataset.class_names)
        # Rounded, so that float noise does not make 11 of 0.55 x 20 classes 12.
        base = math.ceil(round(self.options.base_share * classes, 9))
        # With a single base class every prediction would be right, and nothing could be learned.
        if not 2 <= base < classes:
            raise UserError(
                f"protocol base_to_new: {base} of {classes} classes would be base; it takes two or "
                "more and leaves one or more. Change protocol_options.base_to_new.base_share."
            )
        order = np.arange(classes)
        if self.options.base == "random":
            order = generator(self.config.seed, "base classes").permutation(classes)
        view, held = hold_out_classes(dataset, order[base:].tolist())
        if not len(held.index_N):
            raise UserError("protocol base_to_new: the new classes have no test images.")
        return view, held

    def measure_round(
        self, workspace: Workspace, shared: Tensors, line: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        """Accuracy of the global model on the new classes; see `Protocol.measure_round`."""
        if workspace.method.no_transfer_reason is not None:
            return None
        # The protocol `global` measures the base classes in every evaluated round.
        new = _tests(workspace, self.options)[1]
        method, memo = workspace.method_for(new.task), workspace.memo
        score = score_global(method, shared, new.inputs_N, new.labels_N, memo)
        return None if score is None else {"new": score.accuracy}

    def measure_clients(
        self,
        workspace: Workspace,
        clients: Sequence[int],
        shared: Sequence[Tensors],
        private: Sequence[Tensors],
    ) -> list[Numbers]:
        """Accuracy of every personal model in each test; see `Protocol.measure_clients`."""
        rows: list[Numbers] = [{} for _ in clients]
        for test in _possible(workspace, self.options):
            # Other class names need another method object and their own encoding.
            method = workspace.method_for(test.task)
            # Models without private tensors are the same in all blocks of clients.
            memo = None if any(private) else workspace.memo
            encoded = encode_personal(method, shared, private, memo)
            images = test.inputs_N, test.labels_N
            scores = score_models(method, encoded, len(clients), *images, memo)
            for row, score in zip(rows, scores, strict=True):
                assert score.accuracy is not None
                row[test.name] = score.accuracy
        return rows

    def client_numbers(self, workspace: Workspace) -> Ranges:
        """An accuracy per test; see `Protocol.client_numbers`."""
        return {test.name: (0, 1) for test in _possible(workspace, self.options)}

    def measure(self, run: Finished) -> dict[str, Any]:
        """Accuracies and harmonic means of zero-shot, global and personal models."""
        workspace, tests = run.workspace, _tests(run.workspace, self.options)
        assert workspace.held_out is not None
        # Zero-shot is built for each list of names, so that it competes under the same conditions.
        by_task = {t.task: zero_shot(workspace.clip, t.task) for t in tests}
        rows = [
            _row(
                "zero-shot",
                {t.name: _accuracy(by_task[t.task], {}, t) for t in tests},
            )
        ]
        method = workspace.method
        why = method.no_transfer_reason
        possible = _possible(workspace, self.options)
        if method.has_global:
            accuracy = {
                t.name: _accuracy(workspace.method_for(t.task), run.shared, t, workspace.memo)
                for t in possible
            }
            rows.append(_row("global", accuracy, why=why))
        else:
            rows.append(_row("global", {}, why=NO_GLOBAL))
        if run.clients:
            spread = {
                t.name: [float(numbers[t.name]) for numbers in run.clients.values()]
                for t in possible
            }
            mean = {name: float(np.mean(values)) for name, values in spread.items()}
            std = {name: sample_std(values) for name, values in spread.items()}
            rows.append(_row("personal", mean, std, why=why))
        return {
            "base_classes": list(workspace.task.class_names),
            "new_classes": list(workspace.held_out.class_names),
            "base_images": len(tests[0].labels_N),
            "new_images": len(tests[1].labels_N),
            "rows": rows,
        }

    @classmethod
    def table(cls, part: Part) -> Table:
        """One row per model."""
        rows = part["rows"]
        more = any(row["base_of_all"] is not None for row in rows)
        columns = ["model", "base", "new", "harmonic mean"]
        columns += ["base, all names", "new, all names", "harmonic, all names"] if more else []
        cells = []
        for row in rows:
            std = row["std"]
            line = [row["model"]]
            line += [percent_spread(row[n], std.get(n)) for n in ("base", "new")]
            line.append(percent(row["harmonic"]))
            if more:
                line += [percent_spread(row[n], std.get(n)) for n in ("base_of_all", "new_of_all")]
                line.append(percent(row["harmonic_of_all"]))
            cells.append(tuple(line))
        base, new = len(part["base_classes"]), len(part["new_classes"])
        note = (
            f"{base} base classes ({part['base_images']:,} test images), {new} new classes "
            f"({part['new_images']:,}), each tested with its own class names only; personal: mean "
            "± std over clients, each tested on all of these images."
        )
        note += "".join(f" {row['model']}: {row['why']}." for row in rows if row["why"])
        return Table(cls.title, tuple(columns), tuple(cells), note)

    @classmethod
    def figure(cls, part: Part, run: RunData) -> Figure:
        """Bars per model."""
        rows = [row for row in part["rows"] if row["base"] is not None]
        return model_bars(
            cls.name,
            cls.title,
            cls.caption,
            ["base classes", "new classes", "harmonic mean"],
            {row["model"]: [row["base"], row["new"], row["harmonic"]] for row in rows},
            {row["model"]: [row["std"].get("base"), row["std"].get("new"), None] for row in rows},
        )


def _tests(workspace: Workspace, options: BaseToNewOptions) -> list[_Test]:
    """The tests of both halves with their own names, and with all names for `all_classes`.

    The base test comes first and the new one second.
    """
    held, task = workspace.held_out, workspace.task
    assert held is not None
    base_inputs, base_labels = workspace.server_test()
    new_inputs, new_labels = workspace.held_out_test()
    tests = [
        _Test("base", task, base_inputs, base_labels),
        _Test("new", replace(task, class_names=held.class_names), new_inputs, new_labels),
    ]
    if options.all_classes:
        every = replace(task, class_names=(*task.class_names, *held.class_names))
        # In the joint list of names, the new classes follow the base classes.
        shifted = new_labels + len(task.class_names)
        tests.append(_Test("base_of_all", every, base_inputs, base_labels))
        tests.append(_Test("new_of_all", every, new_inputs, shifted))
    return tests


def _possible(workspace: Workspace, options: BaseToNewOptions) -> list[_Test]:
    """The tests that the method can take: without transfer, those with the clients' class names."""
    transfers = workspace.method.no_transfer_reason is None
    tests = _tests(workspace, options)
    return [test for test in tests if transfers or test.task == workspace.task]


def _accuracy(
    method: Method, shared: Tensors, test: _Test, memo: Memo | None = None
) -> float | None:
    encoded = encode_global(method, shared, memo)
    return score_models(method, encoded, 1, test.inputs_N, test.labels_N, memo)[0].accuracy


def _row(
    model: str,
    accuracy: Mapping[str, float | None],
    std: Mapping[str, float | None] | None = None,
    *,
    why: str | None = None,
) -> dict[str, Any]:
    """One model's results.

    Args:
        model: name of the model.
        accuracy: accuracy by name of the test; None or missing if it was not measured.
        std: standard deviation over clients by name of the test, for personal models.
        why: why the method does not allow some measurements, or None.
    """
    row: dict[str, Any] = {"model": model, "std": dict(std or {}), "why": why}
    for end in ("", "_of_all"):
        base, new = accuracy.get(f"base{end}"), accuracy.get(f"new{end}")
        both = base is not None and new is not None
        row |= {f"base{end}": base, f"new{end}": new}
        row[f"harmonic{end}"] = harmonic_mean(base, new) if both else None  # type: ignore[arg-type]
    return row
