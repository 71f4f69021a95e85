"""FedLoCoOp: LoCoOp in a federation, a baseline of FOCoOp's paper.

Sources: FOCoOp (Liao et al., ICML 2025, arXiv 2506.16218; code PengyangZhou/FOCoOp, commit f30f6f3)
for the federation; LoCoOp (Miyai et al., NeurIPS 2023) for the method, see `locoop.py`. The context
is averaged. The settings are those of that code: lambda 0.1, and K = 5 of 100 classes.

TRAP of the code, which is not reproduced: its client computes gradients and never takes a step,
because steps are only taken with `precision=amp`, and `precision` is None by default. So the
published baseline is the random context with which it starts.

How we differ: K is a share of the classes, see `locoop.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedprompt.config.fields import option
from fedprompt.config.search import Range, log_range
from fedprompt.methods.locoop import LoCoOp, LoCoOpConfig


@dataclass(frozen=True)
class FedLoCoOpConfig(LoCoOpConfig):
    """Defaults: those of FOCoOp's code."""

    ood_weight: float = option(
        0.1, "weight of the regions' entropy (lambda)", ge=0, search=log_range(0.02, 1)
    )
    top_share: float = option(
        0.05,
        "K as a share of the classes: a region shows the label if it is among its K best",
        gt=0, lt=1, search=Range(0.02, 0.5),
    )  # fmt: skip


class FedLoCoOp(LoCoOp):
    """LoCoOp with the settings of its federated version."""

    name = "fedlocoop"
    source = "Liao et al., ICML 2025 (baseline)"
    Config = FedLoCoOpConfig
