"""SABRE-FL: the clients whose image embeddings look triggered most are left out of the mean.

Source: SABRE-FL: Selective and Accurate Backdoor Rejection for Federated Prompt Learning (Khan,
Chandio, Anwar, ICLR 2026, arXiv 2506.22506). Reconstructed from its abstract and from notes of
others; its code has not been released. A detector, trained offline on pairs of clean and triggered
images of another data set, scores the embeddings e that clients send:

    score_k = mean over the client's embeddings of sigmoid(<w, e> + b)

The m clients with the highest scores are left out, and FedAvg follows. The embeddings are the
shared tensor `embeddings` (N, D) of method `sabre_fl`, in which the server sends zeros back.

What it costs: the server sees embeddings of the clients' images. They say far more about the images
than prompts do: fedprompt's own audit (docs/privacy.md) counts a recovered embedding as a success
of an attack. Secure aggregation cannot hide them either, since single ones are scored. And m must
be known: an honest client is left out for every attacker too few. An attacker that lies about its
embeddings, and sends those of its images without the trigger, is not found; whether the paper
considers one is not known to us.

How we differ: the detector is linear and its file is made by `scripts/train_backdoor_detector.py`.
The one that is shipped is for the embedded backbone, trained on drawn scenes of two domains with
`attack.eps=2`. It is a weak one: on other images and other triggers, a triggered image scores above
a clean one in 63 % of pairs, where 50 % is a guess. Any other backbone needs a detector of its own.

Suffixes: U updates, N embeddings, D joint embedding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit

from fedprompt.config.fields import option
from fedprompt.errors import UserError
from fedprompt.federation.screening import Update
from fedprompt.messages import Arrays

from .fedavg import FedAvg, FedAvgConfig
from .parts.required import require_shared
from .parts.vectors import Rows, count_of

EMBEDDINGS = "embeddings"
"""The shared tensor (N, D) with embeddings of a client's training images."""
SHIPPED = Path(__file__).parent / "assets" / "sabre_fl_tiny.json"
"""The detector for the embedded backbone."""


@dataclass(frozen=True)
class SabreFLConfig(FedAvgConfig):
    """The detector, and how many clients are left out."""

    name: str = option("sabre_fl", "strategy name")
    detector: str | None = option(
        None,
        "file of the detector, made by scripts/train_backdoor_detector.py; null = the one for the "
        "embedded backbone",
        path=True,
    )
    attackers: float = option(0.3, "share of the clients that are left out", ge=0, lt=1)


class SabreFL(FedAvg):
    """FedAvg without the clients with the highest scores.

    Raises:
        UserError: the method sends no embeddings, or the detector cannot be read or is one for
            embeddings of another size.
    """

    name = "sabre_fl"
    Config = SabreFLConfig
    config: SabreFLConfig

    def __init__(self, config: Any, *, shapes: Mapping[str, tuple[int, ...]], **rest: Any) -> None:
        require_shared(self.name, EMBEDDINGS, shapes, example="sabre_fl")
        super().__init__(config, shapes=shapes, **rest)
        path = Path(self.config.detector or SHIPPED).expanduser()
        self._weight_D, self._bias = read_detector(path)
        size = shapes[EMBEDDINGS][-1] if shapes else len(self._weight_D)
        if len(self._weight_D) != size:
            which = "null, the embedded backbone's," if self.config.detector is None else str(path)
            raise UserError(
                f"config: strategy.detector is {which} for embeddings of {len(self._weight_D)} "
                f"numbers, but this backbone's have {size}; make one with 'python "
                "scripts/train_backdoor_detector.py EXPERIMENT --out FILE backbone=NAME'."
            )
        self._scores: dict[str, float] = {}
        self._left_out: list[int] = []

    def aggregate(self, server_round: int, shared: Arrays, updates: list[Update]) -> Arrays:
        """FedAvg of the clients with the lowest scores; zeros for the embeddings."""
        if not shared:
            return {}
        score_U = np.array([self.score(u.arrays[EMBEDDINGS]) for u in updates])
        # A stable sort over updates by client id: of equal scores the lowest ids count.
        kept = len(updates) - min(count_of(self.config.attackers, len(updates)), len(updates) - 1)
        chosen = set(np.argsort(score_U, kind="stable")[:kept].tolist())
        self._scores = {str(u.client): float(s) for u, s in zip(updates, score_U, strict=True)}
        self._left_out = [u.client for k, u in enumerate(updates) if k not in chosen]
        used = [u for k, u in enumerate(updates) if k in chosen]
        after = super().aggregate(server_round, shared, used)
        # The server must not send a client's embeddings to the others.
        return {**after, EMBEDDINGS: np.zeros_like(shared[EMBEDDINGS])}

    def forget_round(self) -> None:
        """No client was scored."""
        self._scores, self._left_out = {}, []

    @classmethod
    def works_without_rounds(cls) -> bool:
        """No: embeddings are no change that staleness could scale."""
        return False

    def score(self, embeddings_ND: Rows) -> float:
        """The mean probability that an embedding is that of a triggered image."""
        values_N = (embeddings_ND.astype(np.float64) * self._weight_D).sum(axis=1) + self._bias
        return float(expit(values_N).mean())

    def metrics(self) -> dict[str, Any]:
        """The scores of the last round by client, and the clients that were left out."""
        return {"scores": self._scores, "left_out": self._left_out}


def read_detector(path: Path) -> tuple[Rows, float]:
    """The weights (D,) and the bias of a detector.

    Args:
        path: its file.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        weight_D = np.array(content["weight"], dtype=np.float64)
        bias = float(content["bias"])
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"config: strategy.detector: {path}: {reason}.") from None
    except (ValueError, TypeError, KeyError):
        raise UserError(
            f"config: strategy.detector: {path} must hold 'weight', a list of numbers, and 'bias', "
            "as scripts/train_backdoor_detector.py writes them."
        ) from None
    if weight_D.ndim != 1 or not np.isfinite([*weight_D, bias]).all():
        raise UserError(f"config: strategy.detector: 'weight' in {path} must be finite numbers.")
    return weight_D, bias
