"""Privacy audit: what the shared prompts reveal about the images that they were trained on.

There are four attacks. Each is compared with a guess that does not use the prompts. The first
attack needs only the final model. The others see what one client uploads, as the server does, after
one more round of its usual training from the final prompts (with the learning rate of the first
round, and with `privacy.noise`).
    member, model     loss of the final global model on an image: lower for members? (Yeom et al.,
                      CSF 2018, arXiv 1709.01604); area under the ROC, guess 0.5
    member, update    how far one client's update lowers the loss of an image; likewise
    class mix         the client's class shares from its update: total variation to the true ones;
                      guess: uniform
    image             the feature of the one image behind one step of SGD: cosine with the true one;
                      guess: the mean feature of the class (for methods that see features alone)
Members are a client's own training images, and non-members its own test images: images of other
clients could be told apart by their classes alone. The AUC is averaged over all clients, weighted
by pairs. The true positive rate at a false positive rate near 0 would say more (Carlini et al., S&P
2022, arXiv 2112.03570), but the test sets are far too small for it. The attacks run on the client's
side, where its images are, and return numbers only.

A failed attack does not prove privacy. Epsilon, if the run has one, is a bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fedprompt.config.fields import option
from fedprompt.evaluation.metrics import auroc
from fedprompt.evaluation.protocol import Finished, Numbers, Part, Reported
from fedprompt.messages import MAX_EXAMPLES, Ranges
from fedprompt.privacy.inversion import Attacker, cosine, uploaded_by
from fedprompt.reports.figure import Axis, Bars, BarSeries, Figure, palette
from fedprompt.reports.format import Table

if TYPE_CHECKING:
    from fedprompt.methods.base import Tensors
    from fedprompt.reports.run_data import RunData
    from fedprompt.workspace import Workspace

ATTACKS = {
    "model": "member, model",
    "update": "member, update",
    "classes": "class mix",
    "image": "image",
}
"""The attacks: keys of the results, and names in tables."""


@dataclass(frozen=True)
class PrivacyAuditOptions:
    """How much work the attacker does."""

    candidates: int = option(128, "image: features whose updates the attacker imagines", ge=2)
    images: int = option(3, "image: clients whose first training image is attacked", ge=0)


class PrivacyAudit(Reported):
    """Membership inference, class mix and inversion, each compared with a guess."""

    name = "privacy_audit"
    title = "Privacy audit"
    caption = "Grey: what can be guessed without the prompts. 0.5 = chance for the members."
    Options = PrivacyAuditOptions
    asks_clients = True
    options: PrivacyAuditOptions

    def measure_clients(
        self,
        workspace: Workspace,
        clients: Sequence[int],
        shared: Sequence[Tensors],
        private: Sequence[Tensors],
    ) -> list[Numbers]:
        """Results of the attacks on every client; see `Protocol.measure_clients`.

        All numbers are zero for a client that does not train or shares nothing. The counts `pairs`,
        `trained` and `inverted` are the weights in the means over clients, so zeros do not count.
        """
        return [
            self._attack(workspace, client, received, own)
            for client, received, own in zip(clients, shared, private, strict=True)
        ]

    def _attack(
        self, workspace: Workspace, client: int, received: Tensors, private: Tensors
    ) -> Numbers:
        numbers: Numbers = dict.fromkeys(NUMBERS, 0.0)
        trains = client in workspace.partition.trainable
        if not trains or not workspace.shared_shapes or not workspace.method.trainable:
            return numbers
        attacker = Attacker(workspace, client, received)
        data, (others, other_labels) = workspace.train_data(client), workspace.test_data(client)
        # Only view 0: the other views are augmented, which no test image is.
        members = data.inputs[: len(data)], data.labels_N
        uploaded = uploaded_by(workspace, client, received, private, image=None)
        if len(other_labels):
            before, after = (
                [attacker.losses(prompts, *some) for some in (members, (others, other_labels))]
                for prompts in ({}, uploaded)
            )
            numbers["pairs"] = len(data) * len(other_labels)
            # Members have a lower loss, and an update lowers their loss further.
            numbers["model"] = auroc(-before[0], -before[1])
            numbers["update"] = auroc(before[0] - after[0], before[1] - after[1])
        classes = len(workspace.task.class_names)
        true_C = np.bincount(data.labels_N.numpy(), minlength=classes) / len(data)
        numbers["classes"] = variation(attacker.class_shares(uploaded), true_C)
        numbers["classes_guess"] = variation(np.full(classes, 1 / classes), true_C)
        numbers["trained"] = 1
        return numbers | self._invert(workspace, attacker, received, private)

    def _invert(
        self, workspace: Workspace, attacker: Attacker, received: Tensors, private: Tensors
    ) -> Numbers:
        client, privacy = attacker.client, workspace.config.privacy
        # The attacker trains on many imagined images per client, so only a few are attacked. It
        # reconstructs a feature vector, so the update may depend on nothing else.
        few = sorted(workspace.partition.trainable)[: self.options.images]
        method = workspace.method
        if client not in few or method.needs | method.needs_to_train != {"features"}:
            return {}
        data = workspace.train_data(client)
        label, true_D = int(data.labels_N[0]), data.inputs.features[0].double().numpy()
        uploaded = uploaded_by(workspace, client, received, private, image=0)
        noise = privacy.noise * privacy.clip
        found_D = attacker.feature(uploaded, label, self.options.candidates, noise)
        if found_D is None:
            return {}
        guess_D = attacker.own_features(label).mean(0)
        image, guess = cosine(found_D, true_D), cosine(guess_D, true_D)
        return {"image": image, "image_guess": guess, "inverted": 1}

    def client_numbers(self, workspace: Workspace) -> Ranges:
        """Weights, and results of the attacks; see `Protocol.client_numbers`."""
        pairs = float(MAX_EXAMPLES) ** 2
        # Areas and distances are in [0, 1] and cosines in [-1, 1], apart from rounding.
        return {**dict.fromkeys(NUMBERS, (-1.01, 1.01)), "pairs": (0, pairs), **WEIGHTS}

    def measure(self, run: Finished) -> dict[str, Any]:
        """Means over clients; None for an attack that could not be run on any client."""
        rows = list(run.clients.values())
        pairs = [r["pairs"] for r in rows]
        trained, inverted = [r["trained"] for r in rows], [r["inverted"] for r in rows]
        last = run.rounds[-1] if run.rounds else {}
        spent = last.get("privacy") or {}
        epsilons = {
            "server": (last.get("strategy") or {}).get("epsilon"), "client": spent.get("epsilon")
        }  # fmt: skip
        if "image_epsilon" in spent:
            epsilons["image"] = spent["image_epsilon"]
        return {
            "attacks": {
                "model": {"result": _mean(rows, "model", pairs), "guess": 0.5},
                "update": {"result": _mean(rows, "update", pairs), "guess": 0.5},
                "classes": {
                    "result": _mean(rows, "classes", trained),
                    "guess": _mean(rows, "classes_guess", trained),
                },
                "image": {
                    "result": _mean(rows, "image", inverted),
                    "guess": _mean(rows, "image_guess", inverted),
                },
            },
            "epsilon": epsilons,
        }

    @classmethod
    def table(cls, part: Part) -> Table:
        """One row per attack."""
        rows = tuple(
            (title, _number(part["attacks"][key]["result"]), _number(part["attacks"][key]["guess"]))
            for key, title in ATTACKS.items()
        )
        note = "Members: area under the ROC. Class mix: distance, lower = found. Image: cosine."
        return Table(cls.title, ("attack", "result", "guess"), rows, f"{note} {_bound(part)}")

    @classmethod
    def figure(cls, part: Part, run: RunData) -> Figure:
        """Bars of each attack and of its guess."""
        attacks = part["attacks"]
        guess = BarSeries("guess", "bars", [attacks[k]["guess"] for k in ATTACKS])
        result = BarSeries("attack", "own", [attacks[k]["result"] for k in ATTACKS])
        return cls._bars([guess, result])

    @classmethod
    def _bars(cls, series: Sequence[BarSeries]) -> Figure:
        panel = Bars(labels=list(ATTACKS.values()), series=series, x=Axis(), y=Axis(low=0, high=1))
        return Figure(name=cls.name, title=cls.title, caption=cls.caption, panels=[panel])

    @classmethod
    def compare(cls, runs: Sequence[tuple[str, Part]]) -> tuple[Table, Figure]:
        """Compare the attacks on several runs, for example with and without noise."""
        rows = tuple(
            (name, *(_number(part["attacks"][k]["result"]) for k in ATTACKS), _epsilon(part))
            for name, part in runs
        )
        table = Table(cls.title, ("run", *ATTACKS.values(), "epsilon"), rows)
        series = [
            BarSeries(name, palette(i), [part["attacks"][k]["result"] for k in ATTACKS])
            for i, (name, part) in enumerate(runs)
        ]
        return table, cls._bars(series)


NUMBERS = (
    "pairs", "model", "update", "trained", "classes", "classes_guess", "inverted", "image",
    "image_guess",
)  # fmt: skip
"""The numbers that every client reports."""
WEIGHTS: Ranges = {"trained": (0, 1), "inverted": (0, 1)}
"""Limits of those that weigh a client in a mean, besides `pairs`."""


def variation(a: Any, b: Any) -> float:
    """Total variation distance of two distributions: 0 if they are equal, 1 if disjoint."""
    return float(np.abs(np.asarray(a) - np.asarray(b)).sum() / 2)


def _mean(rows: Sequence[Mapping[str, Any]], name: str, weights: Sequence[float]) -> float | None:
    total = sum(weights)
    return sum(r[name] * w for r, w in zip(rows, weights, strict=True)) / total if total else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _epsilon(part: Part) -> str:
    known = {who: e for who, e in part["epsilon"].items() if e is not None}
    return ", ".join(f"{e:.3g} ({who})" for who, e in known.items()) or "none"


def _bound(part: Part) -> str:
    return f"Epsilon: {_epsilon(part)}."
