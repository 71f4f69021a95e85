"""Test-time adaptation: what a model gains if it goes on learning from unlabelled test images.

Test images arrive as a stream of batches, in an order that is drawn at random, class by class or
domain by domain. Nothing else is seen: neither labels nor training images, and nothing is sent. The
rules and their sources are in `fedprompt/evaluation/adaptation.py`. An image is answered once, in
the batch in which it arrives, and the accuracy with adaptation counts these answers; without
adaptation it is that of the model as it was trained, on the same images.

The global model adapts on the server, on its test images, or on the held-out domain if another
protocol of the run has held one out. With `client_images`, every personal model adapts on its
client, on a stream of the client's own test images, from its own start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedprompt.config.fields import option
from fedprompt.data.features.inputs import Inputs
from fedprompt.errors import UserError
from fedprompt.evaluation.adaptation import (
    AdaptationOptions,
    Prompted,
    VisualDomainPrompt,
    tent,
    tpt,
)
from fedprompt.evaluation.perturbations import ATTACKABLE, normalised, open_pixels
from fedprompt.evaluation.protocol import Finished, Numbers, Part, Reported
from fedprompt.messages import MAX_EXAMPLES, Ranges
from fedprompt.methods.base import Method, Tensors, takes_steps
from fedprompt.methods.registry import zero_shot
from fedprompt.reports.figure import Figure
from fedprompt.reports.figure_parts import model_bars
from fedprompt.reports.format import Table, percent
from fedprompt.rng import generator
from fedprompt.scoring import encode_global, logits_of

if TYPE_CHECKING:
    from fedprompt.reports.run_data import RunData
    from fedprompt.workspace import Workspace

Index = NDArray[np.int64]


@dataclass(frozen=True)
class AtTestTimeOptions(AdaptationOptions):
    """The stream, and the options of the rules."""

    order: Literal["shuffled", "by_class", "by_domain"] = option(
        "shuffled", "order of the stream; by_class, by_domain: one after the other"
    )
    images: int = option(1000, "most images in the server's stream", ge=1)
    client_images: int = option(64, "most images in the stream of each client; 0 = none", ge=0)


class AtTestTime(Reported):
    """Accuracy with and without adaptation."""

    name = "at_test_time"
    title = "Test-time adaptation"
    caption = "Accuracy on a stream of test images, without and with adaptation to it."
    Options = AtTestTimeOptions
    asks_clients = True
    transductive = True
    options: AtTestTimeOptions

    @classmethod
    def suits(cls, method: Method) -> bool:
        """Whether the method has tensors that gradients move."""
        return takes_steps(method)

    def open(self, workspace: Workspace) -> None:
        """Refuse what cannot adapt; see `Protocol.open`."""
        method, rule = workspace.method, self.options.rule
        if not self.suits(method):
            raise UserError(
                f"protocol at_test_time adapts what gradients move, and method '{method.name}' "
                "trains nothing by gradients; leave the protocol out, or use another method."
            )
        if rule == "vdp" and not method.needs <= ATTACKABLE:
            needs = ", ".join(sorted(method.needs - ATTACKABLE))
            raise UserError(
                "protocol_options.at_test_time.rule=vdp changes pixels, but method "
                f"'{method.name}' also reads {needs} of an image; use rule=tent, or another method."
            )
        if rule == "tpt" and len(workspace.views) == 1:
            raise UserError(
                "protocol_options.at_test_time.rule=tpt needs several views of each image, and "
                "data.views is 1; set data.views=16, for example."
            )

    def measure_clients(
        self,
        workspace: Workspace,
        clients: Sequence[int],
        shared: Sequence[Tensors],
        private: Sequence[Tensors],
    ) -> list[Numbers]:
        """Right answers without and with adaptation; see `Protocol.measure_clients`."""
        rows: list[Numbers] = []
        for client, received, own in zip(clients, shared, private, strict=True):
            index = workspace.partition.test(client)
            labels_N = workspace.dataset.labels_N[index]
            stream = self._stream(workspace, index, labels_N, self.options.client_images, client)
            before, after, _ = self._counts(
                workspace, received, own, index[stream], labels_N[stream]
            )
            rows.append({"tested": len(stream), "before": before, "after": after})
        return rows

    def client_numbers(self, workspace: Workspace) -> Ranges:
        """Images and right answers; see `Protocol.client_numbers`."""
        return {"tested": (0, MAX_EXAMPLES), "before": (0, "tested"), "after": (0, "tested")}

    def measure(self, run: Finished) -> dict[str, Any]:
        """Accuracies of zero-shot CLIP, which does not adapt, global and personal models."""
        workspace, held = run.workspace, run.workspace.held_out
        if held is not None and held.kind == "domain":
            where, index, labels_N = held.name, held.index_N, held.labels_N
        else:
            index = workspace.partition.server_test
            where, labels_N = "server's test images", workspace.dataset.labels_N[index]
        stream = self._stream(workspace, index, labels_N, self.options.images, "server")
        index, labels_N = index[stream], labels_N[stream]
        plain = zero_shot(workspace.clip, workspace.task)
        images = workspace.views[0].rows(index, {"features"})
        hits = _right(list(logits_of(plain, encode_global(plain, {}), images)), labels_N)
        rows: list[dict[str, Any]] = [
            {"model": "zero-shot", "images": len(index), "before": hits, "after": None}
        ]
        changes = 0
        if workspace.method.has_global:
            before, after, changes = self._counts(workspace, run.shared, None, index, labels_N)
            rows.append({"model": "global", "images": len(index), "before": before, "after": after})
        tested = sum(int(numbers["tested"]) for numbers in run.clients.values())
        if tested:
            sums = {
                n: sum(int(row[n]) for row in run.clients.values()) for n in ("before", "after")
            }
            rows.append({"model": "personal", "images": tested, **sums})
        return {
            "rule": self.options.rule,
            "order": self.options.order,
            "where": where,
            "domain_changes": changes,
            "rows": [
                row | {n: None if row[n] is None else row[n] / row["images"] for n in BOTH}
                for row in rows
            ],
        }

    @classmethod
    def table(cls, part: Part) -> Table:
        """One row per model."""
        return _table(cls.title, [("", part)])

    @classmethod
    def figure(cls, part: Part, run: RunData) -> Figure:
        """Both accuracies of each model."""
        rows = {row["model"]: [row["before"], row["after"]] for row in part["rows"]}
        return model_bars(
            cls.name, f"{cls.title}: {part['rule']}", cls.caption, list(BOTH.values()), rows
        )

    @classmethod
    def compare(cls, runs: Sequence[tuple[str, Part]]) -> tuple[Table, Figure]:
        """One row per run and model; bars of each run's last model."""
        rows = {name: [part["rows"][-1][n] for n in BOTH] for name, part in runs}
        figure = model_bars(cls.name, cls.title, cls.caption, list(BOTH.values()), rows)
        return _table(cls.title, runs), figure

    def _stream(
        self, workspace: Workspace, index: Index, labels_N: Index, most: int, whose: int | str
    ) -> Index:
        """Which of some images arrive, in the order in which they do, as rows of `index`."""
        drawn = generator(self.config.seed, "test stream", whose).permutation(len(index))[:most]
        keys = {"by_class": labels_N, "by_domain": workspace.dataset.domains_N[index]}
        if self.options.order in keys:
            drawn = drawn[np.argsort(keys[self.options.order][drawn], kind="stable")]
        return drawn.astype(np.int64)

    def _counts(
        self,
        workspace: Workspace,
        shared: Tensors,
        private: Tensors | None,
        index: Index,
        labels_N: Index,
    ) -> tuple[int, int, int]:
        """Right answers without and with adaptation, and how often the domain has changed."""
        if not len(index):
            return 0, 0, 0
        method, options = workspace.method, self.options
        model = Prompted(method, shared, private)
        parts = np.split(index, range(options.batch_size, len(index), options.batch_size))
        with torch.no_grad():
            start = {n: t[None] for n, t in model.start.items()}
            encoded = model.encode(start, 1)
        own = workspace.views[0].rows(index, method.needs)
        before = _right(list(logits_of(method, encoded, own)), labels_N)
        changes = 0
        if options.rule == "vdp":
            prompt = VisualDomainPrompt(method.clip, options)
            answers = [prompt.answer(method, encoded, _pixels(workspace, part)) for part in parts]
            changes = prompt.changes
        elif options.rule == "tpt":
            answers = tpt(model, [_views(workspace, part) for part in parts], options)
        else:
            batches = [workspace.views[0].rows(part, method.needs) for part in parts]
            answers = tent(model, batches, options)
        return before, _right(answers, labels_N), changes


BOTH = {"before": "without adaptation", "after": "with adaptation"}


def _right(answers: Sequence[Tensor], labels_N: Index) -> int:
    """Number of right answers."""
    return int((torch.cat(list(answers)).argmax(-1).numpy() == labels_N).sum())


def _views(workspace: Workspace, index: Index) -> list[Inputs]:
    """All views of some images."""
    return [view.rows(index, workspace.method.needs) for view in workspace.views]


def _pixels(workspace: Workspace, index: Index) -> Tensor:
    """Normalised pixels (B, 3, H, W) of some images, on the device of the backbone."""
    clip = workspace.clip
    pixels = open_pixels(clip, workspace.dataset, index.tolist())
    return normalised(clip, pixels).to(clip.device)


def _table(title: str, runs: Sequence[tuple[str, Part]]) -> Table:
    rows = tuple(
        (
            " ".join(filter(None, (row["model"], name and f"({name})"))),
            part["rule"],
            f"{row['images']:,}",
            percent(row["before"]),
            percent(row["after"]),
        )
        for name, part in runs
        for row in part["rows"]
    )
    part = runs[0][1]
    note = (
        f"Stream in the order {part['order']}. Zero-shot and global: {part['where']}; personal: "
        "own test images of all clients, pooled. Zero-shot CLIP does not adapt."
    )
    return Table(title, ("model", "rule", "images", *BOTH.values()), rows, note)
