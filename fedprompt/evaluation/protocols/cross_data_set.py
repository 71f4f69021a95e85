"""Cross-data-set transfer: prompts learned on one data set are tested on others.

Source: Conditional Prompt Learning for Vision-Language Models (Zhou et al., CVPR 2022, arXiv
2203.05557), section 4.2. The learned context is combined with the class names of the other data set
and tested on its test images. The server measures the global model after the last round. Personal
models are not tested, since they are fitted to their client's data. `targets` lists data sets as
`data` does: by name, or as `{use: name, key: value}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedprompt.config.fields import option
from fedprompt.data.cache_files import default_cache_dir
from fedprompt.data.images import name_key
from fedprompt.errors import UserError
from fedprompt.evaluation.other_data_sets import TestSet, complete, open_others
from fedprompt.evaluation.protocol import Finished, Part, Reported
from fedprompt.methods.base import Task
from fedprompt.methods.registry import zero_shot
from fedprompt.reports.figure import Figure
from fedprompt.reports.figure_parts import model_bars
from fedprompt.reports.format import Table, percent
from fedprompt.scoring import score_global

if TYPE_CHECKING:
    from fedprompt.reports.run_data import RunData
    from fedprompt.workspace import Workspace

DEFAULT = [
    {
        "use": "aerial_scenes",
        "title": f"scenes, {name}",
        "domains": [name],
        "images_per_class": 20,
        "test_fraction": 0.75,
    }
    for name in ("steppe", "tundra", "oasis")
]
"""The default targets: domains of the embedded images that are not part of the federation. The
embedded CLIP was trained on them."""


@dataclass(frozen=True)
class CrossDataSetOptions:
    """The other data sets."""

    targets: list[Any] = option(
        [], "data sets to test on, by name or {use: name, ...}; empty = three embedded domains"
    )

    def check(self) -> None:
        """Refuse a run without a target."""
        if not self.targets:
            raise UserError("'targets' is empty; name at least one data set.")


class CrossDataSet(Reported):
    """Accuracy of the global model on other data sets."""

    name = "cross_data_set"
    title = "Cross-data-set transfer"
    needs_global = True
    needs_new_names = True
    caption = "Accuracy on data sets that no client has seen, with their own class names."
    Options = CrossDataSetOptions
    options: CrossDataSetOptions
    _others: list[TestSet]

    @classmethod
    def prepare(cls, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """Expand the targets to complete `data` sections; see `Protocol.prepare`."""
        targets = options.get("targets") or DEFAULT
        return {**options, "targets": complete(targets, f"protocol_options.{cls.name}.targets")}

    def open(self, workspace: Workspace) -> None:
        """Open the targets, and encode their test images if no cache holds them."""
        cache_dir = default_cache_dir(self.config.output.cache)
        self._others = open_others(
            self.options.targets,
            self.config.seed,
            workspace.clip,
            cache_dir,
            workspace.method,
            workspace.config.data,
        )

    def measure(self, run: Finished) -> dict[str, Any]:
        """Zero-shot and global accuracy on every target, and for comparison on the source."""
        workspace = run.workspace
        source_names = set(map(name_key, workspace.task.class_names))
        inputs, labels = workspace.server_test()
        cases = [(workspace.config.data.title, workspace.task, inputs, labels, True)]
        cases += [
            (o.name, Task(o.dataset.class_names, o.templates), o.inputs_N, o.labels_N, False)
            for o in self._others
        ]
        method = workspace.method
        rows = []
        for name, task, inputs_N, labels_N, is_source in cases:
            reference = zero_shot(workspace.clip, task)
            before = score_global(reference, {}, inputs_N, labels_N)
            # Prompts that belong to the training classes can still be tested on the source.
            after = None
            if is_source or method.no_transfer_reason is None:
                after = score_global(workspace.method_for(task), run.shared, inputs_N, labels_N)
            assert before is not None
            rows.append(
                {
                    "data": name,
                    "source": is_source,
                    "images": len(labels_N),
                    "classes": len(task.class_names),
                    "known_classes": sum(name_key(c) in source_names for c in task.class_names),
                    "zero_shot": before.accuracy,
                    "global": None if after is None else after.accuracy,
                }
            )
        why = None
        if not method.has_global:
            why = "the method has no global model"
        elif method.no_transfer_reason is not None:
            why = "the method's tensors belong to the classes it was trained on"
        return {"rows": rows, "why": why}

    @classmethod
    def table(cls, part: Part) -> Table:
        """One row per data set, the source first, the targets' mean last."""
        rows: list[tuple[str, ...]] = [
            (
                row["data"] + (" (source)" if row["source"] else ""),
                f"{row['images']:,}",
                str(row["classes"]),
                str(row["known_classes"]),
                percent(row["zero_shot"]),
                percent(row["global"]),
            )
            for row in part["rows"]
        ]
        targets = [row for row in part["rows"] if not row["source"]]
        means = [percent(_mean([row[key] for row in targets])) for key in ("zero_shot", "global")]
        rows.append(("mean of targets", "", "", "", *means))
        columns = ("data set", "test images", "classes", "of these known", "zero-shot", "global")
        note = "Known: classes whose name the source data set has too."
        if part["why"]:
            note += f" No result of the global model: {part['why']}."
        return Table(cls.title, columns, tuple(rows), note)

    @classmethod
    def figure(cls, part: Part, run: RunData) -> Figure:
        """Bars per data set."""
        rows = part["rows"]
        groups = [row["data"] + (" (source)" if row["source"] else "") for row in rows]
        models = {"zero-shot": [row["zero_shot"] for row in rows]}
        if part["why"] is None:
            models["global"] = [row["global"] for row in rows]
        return model_bars(cls.name, cls.title, cls.caption, groups, models)


def _mean(values: list[float | None]) -> float | None:
    # None if one is missing: a mean over fewer targets could not be compared with other means.
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
