"""ProGrad: gradients that conflict with those of zero-shot CLIP are projected.

Source: Prompt-aligned Gradient for Prompt Tuning (Zhu et al., ICCV 2023, arXiv 2205.14865).
With g the gradient of the cross-entropy and h that of L_KL, each of the whole context as one
vector,

    L_KL = T^2 * mean_i sum_c -q_ic log p_ic,   q = softmax(z0 / T), p = softmax(z / T)
    the optimiser gets   g - lambda * <g, h> h / |h|^2   where <g, h> < 0,   else g,

z0 the logits of the data set's template. Checked against the authors' `trainers/prograd.py` and
`prograd_backward_and_update` of their Dassl.

How we differ: the formula is the paper's. L_KL guides the gradient and is not minimised; it is
reported as `kl` (without the teacher's entropy, as in the public code), and so it is part of the
reported sum of terms. In a federation each client projects the gradient of its own batch. If a data
set has several templates, the teacher is their normalised mean and the start is the first one. The
public code counts the words of a template instead of its tokens: if there is a comma before the
name ("a type of pet, a photo of a {}."), the last token stays frozen behind the M learned ones;
ours is learned. Its class position `middle` fails on an undefined name; ours is CoOp's. The code's
first epoch has the rate 1e-5, and its loader leaves out the last partial batch of an epoch; ours
does neither (docs/concepts.md, "Local training").

Defaults are those of its configs. Its README has lambda 0.8 for 8 and 16 shots of Flowers102, DTD
and EuroSAT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.text_tokens import context_init, token_count
from fedprompt.config.fields import option
from fedprompt.config.search import Range
from fedprompt.errors import UserError
from fedprompt.methods.base import Batch, Task, Tensors
from fedprompt.methods.parts.losses import cosine_logits, cross_entropy, masked_mean
from fedprompt.methods.promptfl import PromptFL, PromptFLConfig

TINY = 1e-30
"""Prevents a division by zero if the gradient of L_KL vanishes; far below any other value."""


@dataclass(frozen=True)
class ProGradConfig(PromptFLConfig):
    """Defaults: 16 tokens that end in the template's words, T = 1, lambda = 1."""

    token_space = True

    start: Literal["template", "context_init"] = option(
        "template",
        "template: the words before the class name, zeros in front of them; context_init: as CoOp",
    )
    temperature: float = option(1.0, "temperature T of the teacher and of the student", gt=0)
    projection: float = option(
        1.0, "part of the conflicting gradient taken away (lambda)", ge=0, search=Range(0.1, 1.0)
    )

    def check(self) -> None:
        """Refuse start words that would not be used."""
        if self.start == "template" and self.context_init is not None:
            raise UserError("'context_init' is not used; set start=context_init.")


class ProGrad(PromptFL):
    """One shared context, moved by projected gradients; nothing private."""

    name = "prograd"
    source = "Zhu et al., ICCV 2023"
    Config = ProGradConfig

    def __init__(self, config: ProGradConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.cfg = config
        self.teacher_CD = clip.zero_shot_classifier(task.class_names, task.templates)

    def init_shared(self, seed: int) -> Tensors:
        """`ctx` (M, d)."""
        words = self.task.templates[0].split("{}")[0].strip()
        if self.cfg.start == "context_init" or not words:
            return super().init_shared(seed)
        embedded = _embedded(self.clip, words)
        spare = self.cfg.context_tokens - len(embedded)
        if spare < 0:
            raise UserError(
                f"the template's words '{words}' are {len(embedded)} tokens, but context_tokens is "
                f"{self.cfg.context_tokens}; raise it or set start=context_init."
            )
        # The words stand directly before the class name, as in the template; zeros precede them.
        return {"ctx": F.pad(embedded, (0, 0, spare, 0))}

    def loss_terms(
        self, shared: Tensors, private: Tensors, encoded: Tensors, batch: Batch
    ) -> dict[str, Tensor]:
        """Cross-entropy `ce`, which is minimised, and `kl`, which its steps must not increase."""
        t = self.cfg.temperature
        logits_KBC = self.logits(encoded, batch.inputs)
        teacher_KBC = cosine_logits(self.clip, batch.inputs.features, self.teacher_CD)
        # L_KL = T^2 * mean_i sum_c -q_ic log p_ic; the teacher carries no gradient.
        kl_KB = -(F.softmax(teacher_KBC / t, -1) * F.log_softmax(logits_KBC / t, -1)).sum(-1)
        return {
            "ce": cross_entropy(logits_KBC, batch),
            "kl": t * t * masked_mean(kl_KB, batch.mask_KB),
        }

    def gradients(
        self, loss_terms: dict[str, Tensor], leaves: Tensors, batch: Batch
    ) -> dict[str, Tensor | None]:
        """The cross-entropy's gradients, without the part that would raise `kl`."""
        tensors = list(leaves.values())
        # Both terms are made of the same logits, so the first pass must keep the graph.
        kl = torch.autograd.grad(loss_terms["kl"].sum(), tensors, retain_graph=True)
        ce = torch.autograd.grad(loss_terms["ce"].sum(), tensors)
        return {
            name: _projected(g, h, self.cfg.projection)
            for name, g, h in zip(leaves, ce, kl, strict=True)
        }


def _projected(g: Tensor, h: Tensor, part: float) -> Tensor:
    """Remove `part` of the component of `g` along `h`, for clients whose gradients conflict.

    Args:
        g: gradients (K, ...) of the cross-entropy.
        h: gradients (K, ...) of L_KL.
        part: lambda.
    """
    # g - lambda * <g, h> h / |h|^2 where <g, h> < 0: the clamp makes it g elsewhere.
    along_K = (g * h).flatten(1).sum(-1)
    share_K = part * along_K.clamp(max=0) / h.flatten(1).square().sum(-1).clamp(min=TINY)
    return g - share_K.view(-1, *(1,) * (g.dim() - 1)) * h


def _embedded(clip: FrozenCLIP, words: str) -> Tensor:
    """Token embeddings (n, d) of the n tokens of `words`."""
    return context_init(clip, words, token_count(clip, words), torch.empty(0))
