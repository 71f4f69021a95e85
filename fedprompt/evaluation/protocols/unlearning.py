"""Unlearning: what a model still knows of a client or of classes that asked to be forgotten.

The reference is exact unlearning: the federation is trained again without the forgotten training
images, with the same seed (Machine Unlearning, Bourtoule et al., S&P 2021, arXiv 1912.03817). After
the last round the server therefore trains 1 + `shadows` further federations, in a simulation only.
Models: zero-shot; `trained`, the run's global model; `left out`, the same model without the tensors
of the classes (`Method.without_classes`; for a client, those of classes that it alone holds), where
the method has such tensors; and `retrained`, the reference, without these tensors as well.

    forgotten   accuracy on the forgotten training images
    unseen      on images of the same kind that nobody trained on: the server's test images of the
                classes, or the client's own test images
    retained    on the server's test images of all other classes, or of all classes
    gap         mean absolute difference of these three to the reference
    extracted   accuracy on unseen images of the class whose mean logits are nearest, with means of
                `extraction_images` of the server's test images per class, which are not tested
    loss, LiRA  membership inference on the forgotten images against local test images of the same
                kind and clients: area under the ROC, and true positive rate at 1 % false positives

LiRA's shadows are federations in which the clients concerned train on a random half of both kinds
of images; every image is in half of the shadows (`fedprompt/evaluation/membership.py`).

For methods with `without_classes`, sets of 1, half and all but one of the classes are left out in
turn, as Pre-Forgettable Models does (Hendrix et al., ACM MM 2025, arXiv 2509.15230), with at most
`subsets` sets of each size instead of all; means over sets. That paper names the extraction of
residual knowledge as well; its public code has none, and `extracted` is ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fedprompt.config.fields import option
from fedprompt.errors import UserError, did_you_mean
from fedprompt.evaluation.forgetting import Request
from fedprompt.evaluation.membership import Floats, likelihood_ratios, success
from fedprompt.evaluation.protocol import Finished, Part, Reported
from fedprompt.evaluation.residue import (
    ACCURACIES,
    RequestImages,
    classes_alone,
    left_out_in_turn,
    margins_under,
)
from fedprompt.methods.base import Method, Tensors
from fedprompt.methods.registry import zero_shot
from fedprompt.reports.figure import Figure
from fedprompt.reports.figure_parts import model_bars
from fedprompt.reports.format import Table, percent, percent_spread

if TYPE_CHECKING:
    from fedprompt.reports.run_data import RunData
    from fedprompt.workspace import Workspace

RETRAINED = "retrained"
NO_OTHERS = "the clients concerned have no test images of the kind"


@dataclass(frozen=True)
class UnlearningOptions:
    """What is forgotten, and how much work the attacker does."""

    classes: list[str] = option([], "classes to forget; neither these nor a client = the first one")
    client: int | None = option(None, "the client to forget instead of classes", ge=0)
    shadows: int = option(8, "LiRA: federations trained for it, even; 0 = no LiRA", ge=0)
    extraction_images: int = option(4, "extracted: test images per class for the means", ge=1)
    subsets: int = option(8, "most sets of classes of each size that are left out in turn", ge=0)

    def check(self) -> None:
        """Refuse two requests at once, and shadows that leave no variance."""
        if self.classes and self.client is not None:
            raise UserError("classes and client are both set; set one of the two.")
        if self.shadows % 2 or self.shadows == 2:
            raise UserError(f"shadows is {self.shadows}; it must be 0, or even and 4 or more.")


class Unlearning(Reported):
    """Accuracies, membership inference and extraction against training without the images."""

    name = "unlearning"
    title = "Unlearning"
    caption = "Accuracy of each model; retrained: the federation without the forgotten images."
    Options = UnlearningOptions
    needs_global = True
    retrains = True
    simulation_only = "trains the federation again without some of the clients' images"
    options: UnlearningOptions

    @classmethod
    def suits(cls, method: Method) -> bool:
        """Whether the method has a global model that learns; see `Protocol.suits`."""
        return super().suits(method) and method.trainable

    def open(self, workspace: Workspace) -> None:
        """Check the method and the request; see `Protocol.open`."""
        if not self.suits(workspace.method):
            raise UserError(
                f"protocol unlearning needs a global model that learns, which method "
                f"'{workspace.method.name}' does not have; use another method."
            )
        if not len(self._request(workspace).forgotten):
            raise UserError(
                "protocol unlearning: no client has training images of what is to be forgotten; "
                "change protocol_options.unlearning.classes or client."
            )

    def references(self, workspace: Workspace) -> Iterator[tuple[str, Workspace]]:
        """The federation without the images, and LiRA's shadows; see `Protocol.references`."""
        request, partition = self._request(workspace), workspace.partition
        yield RETRAINED, workspace.with_partition(request.without(partition))
        if not len(request.others):
            return
        shadows = request.shadows(partition, self.options.shadows, self.config.seed)
        for number, shadow in enumerate(shadows):
            yield f"shadow {number + 1}", workspace.with_partition(shadow)

    def measure(self, run: Finished) -> dict[str, Any]:
        """All measures of each model."""
        workspace = run.workspace
        request, method = self._request(workspace), workspace.method
        plain = zero_shot(workspace.clip, workspace.task)
        models: dict[str, tuple[Method, Tensors]] = {"zero-shot": (plain, {})}
        gone = classes_alone(workspace, request)
        models["trained"] = method, run.shared
        kept = method.without_classes(run.shared, gone) if gone else None
        if kept is not None:
            models["left out"] = method, kept
        retrained = run.references[RETRAINED]
        kept = method.without_classes(retrained, gone) if gone else None
        models[RETRAINED] = method, retrained if kept is None else kept
        measured = RequestImages(workspace, request, self.options.extraction_images)
        accuracy = {name: measured.accuracies(*model) for name, model in models.items()}
        pool = workspace.images(request.pool_P)
        shadows = [
            margins_under(method, shared, *pool)
            for name, shared in run.references.items()
            if name != RETRAINED
        ]
        rows = [
            {
                "model": name,
                **accuracy[name],
                "gap": _gap(accuracy[name], accuracy[RETRAINED]),
                **self._attack(request, margins_under(*model, *pool), shadows),
            }
            for name, model in models.items()
        ]
        return {
            "request": request.title,
            "images": measured.counts() | {"others": len(request.others)},
            "shadows": len(shadows),
            "why_no_membership": None if len(request.others) else NO_OTHERS,
            "rows": rows,
            "subsets": left_out_in_turn(workspace, run.shared, self.options.subsets),
        }

    @classmethod
    def table(cls, part: Part) -> Table:
        """One row per model."""
        rows = tuple((row["model"], *_cells(row)) for row in part["rows"])
        images = part["images"]
        note = (
            f"Forgotten: {part['request']}. {images['forgotten']:,} forgotten images, "
            f"{images['unseen']:,} unseen, {images['retained']:,} retained; {part['shadows']} "
            f"shadows, {images['others']:,} images against which members are told apart."
        )
        if part["why_no_membership"]:
            note += f" No membership inference: {part['why_no_membership']}."
        for row in part["subsets"]:
            note += (
                f" Leaving out {row['classes']} classes ({row['sets']} sets): "
                f"{percent_spread(row['forgotten'], row['forgotten_std'])} on them, "
                f"{percent_spread(row['retained'], row['retained_std'])} on the others."
            )
        return Table(cls.title, ("model", *COLUMNS), rows, note)

    @classmethod
    def figure(cls, part: Part, run: RunData) -> Figure:
        """Bars of the accuracies of each model."""
        keys = (*ACCURACIES, "extracted")
        models = {row["model"]: [row[key] for key in keys] for row in part["rows"]}
        title = f"{cls.title}: {part['request']}"
        return model_bars(cls.name, title, cls.caption, keys, models)

    @classmethod
    def compare(cls, runs: Sequence[tuple[str, Part]]) -> tuple[Table, Figure]:
        """One row per run and model, and the gap to retraining."""
        rows = tuple(
            (name, part["request"], row["model"], *_cells(row))
            for name, part in runs
            for row in part["rows"]
        )
        note = "Gap: mean absolute difference to the run's own federation without the images."
        table = Table(cls.title, ("run", "request", "model", *COLUMNS), rows, note)
        gaps = {
            model: [_gap_of(part, model) for _, part in runs] for model in ("trained", "left out")
        }
        names = [name for name, _ in runs]
        return table, model_bars(cls.name, f"{cls.title}: gap", note, names, gaps)

    def _request(self, workspace: Workspace) -> Request:
        options, partition = self.options, workspace.partition
        if options.client is not None:
            if options.client >= workspace.num_clients:
                raise UserError(
                    f"protocol_options.unlearning.client is {options.client}, but the clients are "
                    f"0 to {workspace.num_clients - 1}."
                )
            return Request.of_client(partition, options.client)
        names = workspace.task.class_names
        for name in options.classes:
            if name not in names:
                hint = did_you_mean(name, names)
                raise UserError(f"protocol_options.unlearning.classes: no class '{name}'.{hint}")
        labels = sorted({names.index(name) for name in options.classes}) or [0]
        if len(labels) == len(names):
            raise UserError("protocol_options.unlearning.classes: all classes would be forgotten.")
        clients = workspace.trainable
        return Request.of_classes(workspace.dataset, partition, tuple(labels), clients)

    def _attack(
        self, request: Request, found_P: Floats, shadows: Sequence[Floats]
    ) -> dict[str, dict[str, float] | None]:
        """Both membership attacks on one model, from its margins of the pool."""
        if not len(request.others):
            return {"loss": None, "lira": None}
        lira = None
        if shadows:
            inside_SP = request.inside(len(shadows), self.config.seed)
            ratios_P = likelihood_ratios(found_P, np.stack(shadows), inside_SP)
            lira = success(ratios_P, request.member_P)
        return {"loss": success(found_P, request.member_P), "lira": lira}


COLUMNS = (
    *ACCURACIES, "gap", "extracted", "loss AUC", "loss TPR", "LiRA AUC", "LiRA TPR"
)  # fmt: skip


def _gap(row: Mapping[str, Any], reference: Mapping[str, Any]) -> float | None:
    pairs = [(row[key], reference[key]) for key in ACCURACIES if row[key] is not None]
    return float(np.mean([abs(a - b) for a, b in pairs])) if pairs else None


def _gap_of(part: Part, model: str) -> float | None:
    gaps = [row["gap"] for row in part["rows"] if row["model"] == model]
    return gaps[0] if gaps else None


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    attacks = [row[kind] or {"auc": None, "tpr": None} for kind in ("loss", "lira")]
    return (
        *(percent(row[key]) for key in (*ACCURACIES, "gap", "extracted")),
        *(
            cell
            for found in attacks
            for cell in (
                "-" if found["auc"] is None else f"{found['auc']:.3f}",
                percent(found["tpr"]),
            )
        ),
    )
