"""Leave one domain out: the models are tested on a domain that no client holds.

Sources: Deeper, Broader and Artier Domain Generalization (Li et al., ICCV 2017, arXiv 1710.03077)
for the protocol; FedCLIP (Lu et al., 2023, arXiv 2302.13485) for its federated form. One run holds
out one domain. `fedprompt sweep leave_one_domain_out` holds out each domain in turn, for several
methods, and prints one table with the mean over the domains; `fedprompt compare --protocol
leave_one_domain_out` prints the table of any runs.

Zero-shot and the global model are tested on seen domains and on the unseen one, with accuracies
over images. Personal models are tested on the unseen domain, with the mean over clients. Nothing is
selected on the unseen domain.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fedprompt.config.fields import option
from fedprompt.config.schema import OutputConfig, to_yaml
from fedprompt.data.dataset import ImageDataset
from fedprompt.data.held_out import HeldOut, hold_out_domain
from fedprompt.errors import UserError, did_you_mean
from fedprompt.evaluation.protocol import Finished, Numbers, Part, Reported
from fedprompt.messages import MAX_EXAMPLES, Ranges
from fedprompt.methods.base import Tensors
from fedprompt.methods.registry import zero_shot
from fedprompt.reports.figure import Figure
from fedprompt.reports.figure_parts import model_bars
from fedprompt.reports.format import Table, percent, percent_spread
from fedprompt.scoring import encode_global, encode_personal, score_global, score_models
from fedprompt.statistics import sample_std

if TYPE_CHECKING:
    from fedprompt.reports.run_data import RunData
    from fedprompt.workspace import Workspace


@dataclass(frozen=True)
class LeaveOneDomainOutOptions:
    """Which domain no client holds."""

    domain: str | None = option(None, "the domain held out; null = the data set's last one")
    images: Literal["test", "all"] = option(
        "test", "its test images, or all of them: no client trains on either"
    )


class LeaveOneDomainOut(Reported):
    """Tests the models on a domain that no client holds."""

    name = "leave_one_domain_out"
    title = "Leave one domain out"
    caption = "Accuracy on the domains that clients hold, and on the one that none holds."
    Options = LeaveOneDomainOutOptions
    asks_clients = True
    options: LeaveOneDomainOutOptions

    @property
    def holds_out(self) -> Literal["domain"]:
        """The unseen domain is held out."""
        return "domain"

    def hold_out(self, dataset: ImageDataset) -> tuple[ImageDataset, HeldOut]:
        """Hold out the unseen domain; see `Protocol.hold_out`."""
        names = dataset.domain_names
        if len(names) < 2:
            raise UserError(
                "protocol leave_one_domain_out needs a data set with two or more domains; "
                f"'{dataset.name}' has one."
            )
        wanted = self.options.domain if self.options.domain is not None else names[-1]
        if wanted not in names:
            hint = did_you_mean(wanted, names)
            raise UserError(f"protocol leave_one_domain_out: no domain '{wanted}'.{hint}")
        tests_only = self.options.images == "test"
        view, held = hold_out_domain(dataset, names.index(wanted), tests_only=tests_only)
        if not len(held.index_N):
            raise UserError(
                f"protocol leave_one_domain_out: domain '{wanted}' has no test images; set "
                "protocol_options.leave_one_domain_out.images=all."
            )
        return view, held

    def measure_round(
        self, workspace: Workspace, shared: Tensors, line: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        """Accuracy of the global model on the unseen domain; see `Protocol.measure_round`."""
        score = score_global(workspace.method, shared, *workspace.held_out_test(), workspace.memo)
        return None if score is None else {"unseen": score.accuracy}

    def measure_clients(
        self,
        workspace: Workspace,
        clients: Sequence[int],
        shared: Sequence[Tensors],
        private: Sequence[Tensors],
    ) -> list[Numbers]:
        """Result of every personal model on the unseen domain; see `Protocol.measure_clients`."""
        method, test = workspace.method, workspace.held_out_test()
        # Models without private tensors are the same in all blocks of clients.
        memo = None if any(private) else workspace.memo
        encoded = encode_personal(method, shared, private, memo)
        scores = score_models(method, encoded, len(clients), *test, memo)
        return [
            {"correct-unseen": score.correct, "tested-unseen": score.tested} for score in scores
        ]

    def client_numbers(self, workspace: Workspace) -> Ranges:
        """Two counts; see `Protocol.client_numbers`."""
        return {"tested-unseen": (1, MAX_EXAMPLES), "correct-unseen": (0, "tested-unseen")}

    def measure(self, run: Finished) -> dict[str, Any]:
        """Accuracies per seen domain, on all seen domains, and on the unseen one."""
        workspace = run.workspace
        assert workspace.held_out is not None
        reference = zero_shot(workspace.clip, workspace.task)
        models = {"zero-shot": (reference, encode_global(reference, {}))}
        if workspace.method.has_global:
            encoded = encode_global(workspace.method, run.shared, workspace.memo)
            models["global"] = (workspace.method, encoded)
        domains_N = workspace.dataset.domains_N[workspace.partition.server_test]
        inputs, labels = workspace.server_test()
        rows: list[dict[str, Any]] = []
        for model, (method, encoded) in models.items():
            by_domain: dict[str, float | None] = {}
            for d, name in enumerate(workspace.dataset.domain_names):
                rows_N = np.flatnonzero(domains_N == d)
                score = score_models(method, encoded, 1, inputs[rows_N], labels[rows_N])[0]
                by_domain[name] = score.accuracy
            # Over all images: domains differ in size, so this is not the mean of their accuracies.
            memo = workspace.memo
            seen = score_models(method, encoded, 1, inputs, labels, memo)[0]
            unseen = score_models(method, encoded, 1, *workspace.held_out_test(), memo)[0]
            rows.append(
                {
                    "model": model,
                    "by_domain": by_domain,
                    "seen": seen.accuracy,
                    "unseen": unseen.accuracy,
                    "std": None,
                }
            )
        accuracy = [n["correct-unseen"] / n["tested-unseen"] for n in run.clients.values()]
        if accuracy:
            mean, std = float(np.mean(accuracy)), sample_std(accuracy)
            rows.append(
                {"model": "personal", "by_domain": {}, "seen": None, "unseen": mean, "std": std}
            )
        return {
            "method": self.config.method.name,
            "settings": self._settings(),
            "unseen_domain": workspace.held_out.name,
            "seen_domains": list(workspace.dataset.domain_names),
            "unseen_images": len(workspace.held_out.index_N),
            "rows": rows,
        }

    def _settings(self) -> str:
        """A digest of the config that is the same whichever domain is held out, for all seeds."""
        options = dict(self.config.protocol_options)
        options.pop(self.name, None)
        same = replace(self.config, seed=0, output=OutputConfig(), protocol_options=options)
        return hashlib.sha256(to_yaml(same).encode()).hexdigest()[:10]

    @classmethod
    def table(cls, part: Part) -> Table:
        """One row per model, one column per domain."""
        seen, unseen = part["seen_domains"], part["unseen_domain"]
        rows = tuple(
            (
                row["model"],
                *(percent(row["by_domain"].get(name)) for name in seen),
                percent(row["seen"]),
                percent_spread(row["unseen"], row["std"]),
            )
            for row in part["rows"]
        )
        note = (
            f"No client holds '{unseen}' ({part['unseen_images']:,} images). Over test images; "
            "personal: mean ± std over clients."
        )
        return Table(cls.title, ("model", *seen, "seen, all", f"unseen: {unseen}"), rows, note)

    @classmethod
    def figure(cls, part: Part, run: RunData) -> Figure:
        """Bars per domain."""
        seen = part["seen_domains"]
        models = {
            row["model"]: [*(row["by_domain"].get(name) for name in seen), row["unseen"]]
            for row in part["rows"]
        }
        spreads = {row["model"]: [*(None for _ in seen), row["std"]] for row in part["rows"]}
        groups = [*seen, f"{part['unseen_domain']} (unseen)"]
        return model_bars(cls.name, cls.title, cls.caption, groups, models, spreads)

    @classmethod
    def compare(cls, runs: Sequence[tuple[str, Part]]) -> tuple[Table, Figure]:
        """The accuracy on each domain in the runs that held it out, and the mean over domains.

        Runs that differ in the domain and the seed only share a row. If several of them held out
        the same domain, their mean counts. Zero-shot CLIP is the same in all runs.
        """
        domains = sorted({part["unseen_domain"] for _, part in runs})
        found: dict[str, dict[str, list[float]]] = {}
        for (_, part), name in zip(runs, _row_names(runs), strict=True):
            for row in part["rows"]:
                zero_shot = row["model"] == "zero-shot"
                model = row["model"] if zero_shot or not name else f"{name}: {row['model']}"
                accuracies = found.setdefault(model, {domain: [] for domain in domains})
                if row["unseen"] is not None:
                    accuracies[part["unseen_domain"]].append(row["unseen"])
        values = {
            model: [float(np.mean(of[d])) if of[d] else None for d in domains]
            for model, of in found.items()
        }
        for means in values.values():
            known = [v for v in means if v is not None]
            # A mean over fewer domains could not be compared with the other models' means.
            means.append(float(np.mean(known)) if len(known) == len(domains) else None)
        rows = tuple((model, *map(percent, means)) for model, means in values.items())
        note = (
            f"Each domain's accuracy is from the runs that held it out ({len(runs)} runs in all); "
            "the last column is the mean over domains."
        )
        table = Table(cls.title, ("model", *domains, "mean"), rows, note)
        title = f"{cls.title}: unseen domains"
        return table, model_bars(cls.name, title, cls.caption, [*domains, "mean"], values)


def _row_names(runs: Sequence[tuple[str, Part]]) -> list[str]:
    """What each run's models are called: nothing, the method, or its run's name.

    Runs of equal settings have one name. Parts that an earlier version has written have no
    settings and count as equal.
    """
    settings = [part.get("settings", "") for _, part in runs]
    methods = {s: part.get("method", "") for s, (_, part) in zip(settings, runs, strict=True)}
    if len(methods) == 1:
        return [""] * len(runs)
    # The first run's name tells variants of a method apart.
    first = {s: name for s, (name, _) in reversed([*zip(settings, runs, strict=True)])}
    several = {m for m, count in Counter(methods.values()).items() if count > 1}
    return [first[s] if methods[s] in several else methods[s] for s in settings]
