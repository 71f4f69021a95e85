"""FedCoCoOp: CoCoOp in a federation, a baseline of FedTPG's paper.

Sources: Federated Text-driven Prompt Generation for Vision-Language Models (Qiu et al., ICLR 2024,
arXiv 2310.06123) for the federation; CoCoOp (Zhou et al., CVPR 2022) for the method. Context and
Meta-Net are averaged with equal weights.

Inferred: FedTPG's public code holds no CoCoOp. The random start of 4 tokens and the uniform average
are those of its other baselines.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedprompt.config.fields import option
from fedprompt.methods.base import UNIFORM_AVERAGE
from fedprompt.methods.cocoop import CoCoOp, CoCoOpConfig


@dataclass(frozen=True)
class FedCoCoOpConfig(CoCoOpConfig):
    """Defaults: 4 context tokens that start at random."""

    supports_image_noise = True
    default_strategy = UNIFORM_AVERAGE

    context_init: str | None = option(None, "words to start from, e.g. 'a photo of a'")


class FedCoCoOp(CoCoOp):
    """CoCoOp with a uniform average."""

    name = "fedcocoop"
    source = "Qiu et al., ICLR 2024 (baseline)"
    Config = FedCoCoOpConfig
