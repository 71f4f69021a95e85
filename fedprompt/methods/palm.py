"""PALM: a learned vector per class, mixed into CLIP's class features; no prompt at all.

Source: PALM: Few-Shot Prompt Learning for Audio Language Models (Hanif, Agro, Qazi, Aldarmaki,
EMNLP 2024, arXiv 2409.19806; code asif-hanif/palm). With t_c the features of the class in words,

    t'_c = norm((1 - sigmoid(lambda_c)) t_c + sigmoid(lambda_c) e_c)

e_c starts from N(0, 0.02^2) and lambda_c from U[0, 1); cosine logits, cross-entropy. Checked
against the code's `palm/palm.py`. No text passes through the text tower in training.

In a federation e_c and lambda_c are averaged over the clients that have images of class c
(`strategies/per_class.py`), because a client without such images only pushes e_c away from its
own. For this purpose a client uploads its LABEL HISTOGRAM as `class_shares` (`parts/class_shares`).
Upload: C (D + 2) numbers.

How we differ: the paper is about sound, and t_c is there the feature of the bare class name; here
it is that of the data set's templates. Its scale of logits is 100; here it is the backbone's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.fields import option
from fedprompt.config.search import Range, log_range
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import Method, MethodConfig, RoundInfo, Task, Tensors
from fedprompt.methods.parts.class_shares import SHARES, class_shares
from fedprompt.methods.parts.losses import cosine_logits
from fedprompt.rng import normal, uniform


@dataclass(frozen=True)
class PALMConfig(MethodConfig):
    """Defaults: the code's start."""

    default_strategy = MappingProxyType({"name": "per_class"})

    init_std: float = option(0.02, "standard deviation of the vectors' start", gt=0)

    @property
    def lr_space(self) -> Range | None:
        """Around the 0.05 of the code."""
        return log_range(0.002, 1.0)


class PALM(Method):
    """`vectors` (C, D) and `lambdas` (C,) are shared; nothing is private."""

    name = "palm"
    source = "Hanif et al., EMNLP 2024"
    Config = PALMConfig
    frozen = frozenset({f"shared.{SHARES}"})
    no_transfer_reason = "each vector belongs to the class that it was trained for"

    def __init__(self, config: PALMConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.cfg = config
        self.start_CD = clip.zero_shot_classifier(task.class_names, task.templates)

    def init_shared(self, seed: int) -> Tensors:
        """`vectors` (C, D), `lambdas` (C,) and `class_shares` (C,)."""
        classes = len(self.task.class_names)
        shape = (classes, self.clip.embed_dim)
        return {
            "vectors": normal(shape, self.cfg.init_std, seed, "init", "shared"),
            "lambdas": uniform((classes,), seed, "init", "lambdas"),
            SHARES: torch.zeros(classes),
        }

    def end_round(
        self, shared: Tensors, private: Tensors, round_info: RoundInfo
    ) -> tuple[Tensors, Tensors]:
        """Add each class's share of the client's training images."""
        return {**shared, SHARES: class_shares(round_info)}, private

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """Class features (K, C, D)."""
        mix_KC1 = shared["lambdas"].sigmoid()[..., None]
        mixed_KCD = (1 - mix_KC1) * self.start_CD + mix_KC1 * shared["vectors"]
        return {"classes": F.normalize(mixed_KCD, dim=-1)}

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """Cosine logits (K, B, C)."""
        return cosine_logits(self.clip, inputs.features, encoded["classes"])
