"""FedMaPLe: MaPLe with all its factors averaged, the multi-modal baseline of FedTPG's paper.

Sources: Federated Text-driven Prompt Generation for Vision-Language Models (Qiu et al., ICLR 2024,
arXiv 2310.06123) compares with it; the prompts are MaPLe's (Khattak et al., CVPR 2023).

FedTPG's public code (boschresearch/FedTPG) does not contain MaPLe, so we do not know its settings.
The defaults are MaPLe's own, with FedTPG's strategy, the mean of all replies with equal weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedprompt.config.fields import option
from fedprompt.methods.base import UNIFORM_AVERAGE
from fedprompt.methods.maple import MaPLe, MaPLeConfig


@dataclass(frozen=True)
class FedMaPLeConfig(MaPLeConfig):
    """MaPLe's hyper-parameters, all factors shared."""

    default_strategy = UNIFORM_AVERAGE

    sharing: Literal["text", "factors", "materialised"] = option("factors", "what is averaged")


class FedMaPLe(MaPLe):
    """Text prompts and projections are shared; nothing is private."""

    name = "fedmaple"
    source = "Qiu et al., ICLR 2024"
    Config = FedMaPLeConfig
    multi_label = True
