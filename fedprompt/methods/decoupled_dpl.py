"""Decoupled Prompt Learning, reconstructed: images attend to visual prompts with a gain.

Source: Decoupled Prompt Learning for Vision-Language Models (Xu, Zhu, Zhang, Shen, Liao, Chen, Wu,
Wang, arXiv 2308.10061), of which only the abstract was readable. It decouples the attention of a
prompted tower by who looks at whom, instances I and prompts P, strengthens some of I -> I, P -> I,
I -> P and P -> P, and approximates others. The exact identity behind it: for a query q of an
instance over the instance tokens X and the prompts P,

    Attn(q, [X; P]) = (1 - lambda) Attn(q, X) + lambda Attn(q, P),
    lambda = sum over P of exp(q k) / (sum over X of exp(q k) + sum over P of exp(q k)).

WHAT IS OURS: which parts the paper strengthens, and how, could not be read. In their place,
`prompt_attn_gain` g multiplies the prompts' exponentials for queries of instances, which makes

    lambda_g = g lambda / (1 - lambda + g lambda)

in every layer of the image tower with prompts. g = 1 is IVLP, bit for bit; g > 1 strengthens what
instances take from prompts. The text tower and the prompts' own queries stay as they are, and the
paper's language-conditioned text prompts are not built. The numbers of the paper cannot be expected
from this reconstruction.

All prompts are averaged over clients, 30,720 numbers on ViT-B/16 in IVLP's setting, and nothing is
private.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.vision_tower import VisionTower
from fedprompt.config.fields import option
from fedprompt.config.search import log_range
from fedprompt.methods.base import Task
from fedprompt.methods.ivlp import IVLP, IVLPConfig


@dataclass(frozen=True)
class DecoupledDPLConfig(IVLPConfig):
    """IVLP's defaults; the gain is ours."""

    prompt_attn_gain: float = option(
        2.0, "how many times instances see each visual prompt; 1 = IVLP",
        gt=0, search=log_range(0.25, 8),
    )  # fmt: skip


class DecoupledDPL(IVLP):
    """IVLP's `text` and `visual`, shared."""

    name = "decoupled_dpl"
    source = "Xu et al., arXiv 2023 (reconstructed from the abstract)"
    Config = DecoupledDPLConfig

    def __init__(self, config: DecoupledDPLConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.vision = VisionTower(clip, config.prompt_attn_gain)
