"""Prompts learned through a backbone in one format, tested through the others.

Source: Compress, Then Prompt: Improving Accuracy-Efficiency Trade-off of LLM Inference with
Transferable Prompt (Xu et al., ICML 2024, arXiv 2305.11186): prompts that are learned through a
quantised or pruned model recover accuracy, and carry over to other levels of compression. Here the
models are CLIP's two towers, and the federation is trained once through each of them. How weights
are quantised and pruned: `fedprompt/backbone/compression.py`; the paper uses GPTQ and SparseGPT.

All clients of a further federation keep the weights in its format. It has the strategy, the rounds
and the seed of the run, and starts from the same prompts.

Shape suffix: F formats.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fedprompt.backbone.compression import Compression
from fedprompt.config.fields import option
from fedprompt.config.schema import FORMATS
from fedprompt.errors import UserError, did_you_mean
from fedprompt.evaluation.protocol import Finished, Part, Reported
from fedprompt.methods.base import Method
from fedprompt.methods.registry import zero_shot
from fedprompt.reports.figure import Axis, Figure, Heat
from fedprompt.reports.format import Table, percent
from fedprompt.scoring import score_global

if TYPE_CHECKING:
    from fedprompt.config.schema import BackboneConfig
    from fedprompt.reports.run_data import RunData
    from fedprompt.workspace import Workspace


@dataclass(frozen=True)
class CompressionOptions:
    """The forms of the backbone beside the run's own."""

    formats: list[str] = option(
        ["float32", "int8", "int4"], "formats of the weights, as backbone.weights"
    )
    pruned: list[float] = option([0.5], "fractions that are set to 0 in float32 weights")

    def check(self) -> None:
        """Refuse formats and fractions that do not exist."""
        for name in self.formats:
            if name not in FORMATS:
                raise UserError(f"formats: '{name}' is not known.{did_you_mean(name, FORMATS)}")
        for fraction in self.pruned:
            if not 0 < fraction < 1:
                raise UserError(f"pruned: {fraction:g} is not between 0 and 1.")


class CompressionMatrix(Reported):
    """A matrix of accuracies: formats that prompts were learned through by formats of the test."""

    name = "compression"
    title = "Compress, then prompt"
    caption = (
        "Accuracy of the global model: the format of the weights that its prompts were learned "
        "through (rows), and of those that it is tested through (columns)."
    )
    Options = CompressionOptions
    needs_global = True
    retrains = True
    simulation_only = "trains the federation again with the backbone in other formats"
    options: CompressionOptions

    @classmethod
    def suits(cls, method: Method) -> bool:
        """Whether the method has a global model that learns; see `Protocol.suits`."""
        return super().suits(method) and method.trainable

    def forms(self, backbone: BackboneConfig) -> list[Compression]:
        """The run's own form, and the others without it."""
        found = [Compression(backbone.weights, backbone.pruned)]
        found += [Compression(name) for name in FORMATS if name in self.options.formats]
        found += [Compression(pruned=fraction) for fraction in self.options.pruned]
        return list(dict.fromkeys(found))

    def open(self, workspace: Workspace) -> None:
        """Check the method, and open the backbone in all forms; see `Protocol.open`."""
        if not self.suits(workspace.method):
            raise UserError(
                "protocol compression needs a global model that learns, which method "
                f"'{workspace.method.name}' does not have; use another method."
            )
        if self.config.backbone.differs:
            raise UserError(
                "protocol compression trains all clients through one format at a time; leave "
                "backbone.client_weights and backbone.client_models out."
            )
        for form in self.forms(self.config.backbone):
            workspace.in_form(form)

    def references(self, workspace: Workspace) -> Iterator[tuple[str, Workspace]]:
        """The federation through the other forms; see `Protocol.references`."""
        for form in self.forms(self.config.backbone)[1:]:
            yield str(form), workspace.in_form(form)

    def measure(self, run: Finished) -> dict[str, Any]:
        """The matrix, and zero-shot accuracy through each form."""
        forms = self.forms(self.config.backbone)
        learned = [run.shared, *(run.references[str(form)] for form in forms[1:])]
        workspaces = [run.workspace.in_form(form) for form in forms]
        plain = [zero_shot(workspace.clip, workspace.task) for workspace in workspaces]
        pairs = list(zip(plain, workspaces, strict=True))
        return {
            "formats": [str(form) for form in forms],
            "accuracy": [
                [_accuracy(w.method, shared, w) for w in workspaces] for shared in learned
            ],
            "zero_shot": [_accuracy(method, {}, workspace) for method, workspace in pairs],
        }

    @classmethod
    def table(cls, part: Part) -> Table:
        """One row per format that prompts were learned through."""
        rows = [("zero-shot", *map(percent, part["zero_shot"]), "-")]
        matrix_FF = np.array(part["accuracy"], dtype=np.float64)
        for i, name in enumerate(part["formats"]):
            elsewhere = np.delete(matrix_FF[i], i)
            loss = float(matrix_FF[i, i] - elsewhere.mean()) if len(elsewhere) else None
            shown = "-" if loss is None else f"{100 * loss:+.1f}"
            rows.append((f"learned on {name}", *map(percent, matrix_FF[i]), shown))
        columns = ("", *(f"tested on {name}" for name in part["formats"]), "own - others")
        note = "Own - others: accuracy through the own format minus the mean of the others, points."
        return Table(cls.title, columns, tuple(rows), note)

    @classmethod
    def figure(cls, part: Part, run: RunData) -> Figure:
        """The matrix as a heat map, below the row of zero-shot CLIP."""
        panel = Heat(
            rows=["zero-shot", *part["formats"]],
            columns=part["formats"],
            cells=[part["zero_shot"], *part["accuracy"]],
            name="accuracy",
            format="percent",
            x=Axis(label="Tested through"),
            y=Axis(label="Learned through"),
            low=0,
            high=1,
        )
        return Figure(name=cls.name, title=cls.title, caption=cls.caption, panels=[panel])


def _accuracy(method: Method, shared: Any, workspace: Workspace) -> float:
    score = score_global(method, shared, *workspace.server_test())
    assert score is not None
    assert score.accuracy is not None
    return score.accuracy
