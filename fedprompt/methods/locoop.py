"""LoCoOp: CoOp that pushes regions of an image without its class away from all classes.

Source: LoCoOp: Few-Shot Out-of-Distribution Detection via Prompt Learning (Miyai, Yu, Irie, Aizawa,
NeurIPS 2023, arXiv 2306.01293). With f_i the local feature of region i of an image of class y and
p_i = softmax(exp(logit_scale) cos(f_i, t)),

    J = {i : y is not among the K most probable classes of p_i}
    L = CE - lambda * mean over i in J of H(p_i),     H(p) = -sum_c p_c log(p_c + 1e-5)

over the regions of the whole batch; the second term is 0 if J is empty. Local features are those
of `fedprompt.backbone.patch_features`: in the last layer every patch sees its own value alone.
Checked against the authors' `trainers/locoop.py` and `clip_w_local/model.py`, from which 1e-5 is.

Shared is CoOp's context, 8,192 numbers for 16 tokens of 512; nothing is private. The regularised
prompts are used as CoOp's are. Their purpose is the detection of images of unknown classes: the
protocol `ood` reports MCM and GL-MCM, the two scores of the paper. In a federation the unknown
classes may be those that no client holds.

How we differ: the paper's K = 200 is for the 1,000 classes of ImageNet, and its code fails or has
an empty J where there are 200 or fewer. Ours is a share of the number of classes, 0.2 as there,
rounded up, and at most C - 1. The term is a mean over each client's own regions. Class-specific
contexts are not offered. The code's first epoch has the rate 1e-5, and its loader leaves out the
last partial batch of an epoch; ours does neither (docs/concepts.md, "Local training").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.fields import option
from fedprompt.config.search import Range, log_range
from fedprompt.methods.base import Batch, Task, Tensors
from fedprompt.methods.parts.losses import cosine_logits
from fedprompt.methods.parts.regions import best_classes, without_label
from fedprompt.methods.promptfl import PromptFL, PromptFLConfig

TINY = 1e-5
"""What the authors' code adds to a probability before its logarithm."""


@dataclass(frozen=True)
class LoCoOpConfig(PromptFLConfig):
    """Defaults: those of the paper and of the code, K = 200 of ImageNet's 1,000 classes."""

    ood_weight: float = option(
        0.25, "weight of the regions' entropy (lambda)", ge=0, search=log_range(0.05, 2)
    )
    top_share: float = option(
        0.2,
        "K as a share of the classes: a region shows the label if it is among its K best",
        gt=0, lt=1, search=Range(0.05, 0.5),
    )  # fmt: skip


class LoCoOp(PromptFL):
    """One shared context; nothing private."""

    name = "locoop"
    source = "Miyai et al., NeurIPS 2023"
    Config = LoCoOpConfig
    needs_to_train = frozenset({"local"})

    def __init__(self, config: LoCoOpConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.cfg = config
        self.top_k = best_classes(config.top_share, len(task.class_names))

    def loss_terms(
        self, shared: Tensors, private: Tensors, encoded: Tensors, batch: Batch
    ) -> dict[str, Tensor]:
        """Cross-entropy `ce`, and `ood`, minus the weighted entropy of the regions in J."""
        loss_terms = super().loss_terms(shared, private, encoded, batch)
        local_KBPD = batch.inputs.local
        assert local_KBPD is not None
        # Every region is scored as if it were an image.
        flat_KRC = cosine_logits(self.clip, local_KBPD.flatten(1, 2), encoded["classes"])
        p_KBPC = flat_KRC.softmax(-1).unflatten(1, tuple(local_KBPD.shape[1:3]))
        weight_KBP = without_label(p_KBPC, batch, self.top_k)
        entropy_KBP = -(p_KBPC * torch.log(p_KBPC + TINY)).sum(-1)
        # The sum is 0 if J is empty, whatever it is then divided by.
        regions_K = weight_KBP.sum((-2, -1)).clamp(min=1)
        mean_K = (entropy_KBP * weight_KBP).sum((-2, -1)) / regions_K
        return {**loss_terms, "ood": -self.cfg.ood_weight * mean_K}
