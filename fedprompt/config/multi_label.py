"""The section of an experiment on images with several labels each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedprompt.config.fields import option


@dataclass(frozen=True)
class MultiLabelConfig:
    """The loss of the multi-label task; without effect where an image has one class."""

    # Defaults of DualCoOp's and FedMPT's public code: (2, 1) on their command lines, 0.05 in ASL.
    loss: Literal["asymmetric", "bce"] = option(
        "asymmetric", "asymmetric = ASL, which weighs easy negatives down; bce = cross-entropy"
    )
    gamma_neg: float = option(2.0, "asymmetric: focusing exponent of absent labels", ge=0)
    gamma_pos: float = option(1.0, "asymmetric: focusing exponent of present labels", ge=0)
    clip: float = option(
        0.05, "asymmetric: probability below which absent labels cost nothing", ge=0, lt=1
    )
