"""FedKgCoOp: KgCoOp in a federation, a baseline of FedTPG's paper.

Sources: Federated Text-driven Prompt Generation for Vision-Language Models (Qiu et al., ICLR 2024,
arXiv 2310.06123) for the federation and its settings; KgCoOp (Yao et al., CVPR 2023) for the
method. Checked against the authors' `model/custom_coop.py` and `federated/server.py`: 4 tokens
N(0, 0.02^2), weight 8, equal weights in the average.

How we differ: there, a client's classes are those of its own data; here all clients know all class
names, as in every other method. The public `CoOpCLIP` cannot run: it calls `encode_text` with an
argument that the function does not take. Each client there owns one optimiser, whose momentum lasts
from round to round (`training.momentum_state: keep`); by default ours starts at zero in each round.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedprompt.config.fields import option
from fedprompt.methods.base import UNIFORM_AVERAGE
from fedprompt.methods.kgcoop import KgCoOp, KgCoOpConfig


@dataclass(frozen=True)
class FedKgCoOpConfig(KgCoOpConfig):
    """Defaults: 4 context tokens that start at random, weight 8."""

    supports_image_noise = True
    token_space = True

    default_strategy = UNIFORM_AVERAGE

    context_init: str | None = option(None, "words to start from, e.g. 'a photo of a'")


class FedKgCoOp(KgCoOp):
    """KgCoOp with a uniform average."""

    name = "fedkgcoop"
    source = "Qiu et al., ICLR 2024 (baseline)"
    Config = FedKgCoOpConfig
    multi_label = True
