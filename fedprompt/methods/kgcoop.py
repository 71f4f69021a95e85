"""KgCoOp: CoOp whose class features stay close to those of a hand-written template.

Source: Visual-Language Prompt Tuning with Knowledge-guided Context Optimization (Yao et al., CVPR
2023, arXiv 2303.13283):

    L = CE + lambda * (1 - (1/C) sum_c cos(t_c, t0_c)),    lambda = 8,

with t_c the features of the learned prompts and t0_c those of the data set's template. Checked
against the authors' `KgCoOp/trainers/kgcoop.py`.

How we differ: if a data set has several templates, t0 is their normalised mean. The AMP branch of
the public code omits the term and cannot run (it passes logits and term together as logits); its
unused Meta-Net, bias vector and adapter are left out. The code's first epoch has the rate 1e-5, and
its loader leaves out the last partial batch of an epoch; ours does neither (docs/concepts.md,
"Local training").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.fields import option
from fedprompt.config.search import log_range
from fedprompt.errors import UserError
from fedprompt.methods.base import Batch, Task, Tensors
from fedprompt.methods.promptfl import PromptFL, PromptFLConfig


@dataclass(frozen=True)
class KgCoOpConfig(PromptFLConfig):
    """Defaults: the paper's 4 context tokens "a photo of a" and weight 8."""

    supports_image_noise = True
    token_space = True

    context_tokens: int = option(4, "context tokens M", ge=1)
    context_init: str | None = option("a photo of a", "words to start from; null = random")
    kg_weight: float = option(
        8.0, "weight of the pull towards the template (lambda)", ge=0, search=log_range(0.5, 20)
    )
    template: str | None = option(None, "sentence with {} as the target; null = the data set's own")

    def check(self) -> None:
        """Refuse a template without a place for the class name."""
        if self.template is not None and self.template.count("{}") != 1:
            raise UserError(f"'template' is '{self.template}'; it must contain {{}} exactly once.")


class KgCoOp(PromptFL):
    """One shared context that stays close to the template; nothing is private."""

    name = "kgcoop"
    source = "Yao et al., CVPR 2023"
    Config = KgCoOpConfig
    multi_label = True

    def __init__(self, config: KgCoOpConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.kg_weight = config.kg_weight
        templates = (config.template,) if config.template else task.templates
        # t0 is frozen, so it is encoded once per class list and carries no gradient.
        self.template_CD = clip.zero_shot_classifier(task.class_names, templates)

    def loss_terms(
        self, shared: Tensors, private: Tensors, encoded: Tensors, batch: Batch
    ) -> dict[str, Tensor]:
        """Cross-entropy `ce` and the weighted distance `kg` to the template's features."""
        loss_terms = super().loss_terms(shared, private, encoded, batch)
        # lambda * (1 - (1/C) sum_c cos(t_c, t0_c)).
        cosine_KC = F.cosine_similarity(encoded["classes"], self.template_CD, dim=-1)
        return {**loss_terms, "kg": self.kg_weight * (1 - cosine_KC.mean(-1))}
