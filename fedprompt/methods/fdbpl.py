"""FDBPL: a prompt and its negative learn a teacher's soft labels of cached regions, without labels.

Source: FDBPL: Faster Distillation-Based Prompt Learning for Region-Aware Vision-Language Models
Adaptation (Zhang et al., Expert Systems with Applications 2025, arXiv 2505.18053). Every image has
a fixed set of random crops, whose soft labels a large teacher gives once. Two contexts are learned:
"a photo of a" gives the class features t+, and "a photo of no" gives t-. With p_T = softmax(z_T)
the teacher's prediction of a region, S+ and S- the predictions of the two contexts, z+ and z- their
logits, H the entropy, and w = 1 - H(p_T) / log C the teacher's confidence in this region,

    L = mean over regions of  w (KL(p_T || S+) + KL(S+ || p_T)) / 2    positive: as the teacher
                              - (1 - w) H(S-)                          negative: undecided
                              + 1e-3 w cos(z+, z-)                     opposite logits
        + lambda PCD

Checked against the authors' `trainers/coop_off.py`, whose H(p_T) has 1e-6 in its logarithm.
Prediction uses the positive context alone. Both contexts are shared, 4,096 numbers for 2 x 4 tokens
of 512; nothing is private.

Regions are the cached views of an image (`data.views`, at most 64, view 0 is the whole image; the
code has 500 crops of at most 0.936 of the area): each is encoded once, ever, so no step passes an
image through any tower. NO LABEL IS USED, so clients without labels train as well
(`partition.unlabelled_clients`). `label_weight` adds the cross-entropy of known labels.

The teacher of the paper is a larger CLIP (DFN5B's ViT-H/14). HERE IT IS THE ZERO-SHOT MODEL OF THE
SAME BACKBONE with an ensemble of templates, because the region's cached feature is all that it
needs: its soft labels are one product with the class features. It can teach the student only what
the ensemble knows better than the prompt. On the embedded scenes that is nothing: the test loss of
such a student does not fall below its start, unless known labels help (`label_weight=1`).

The code's PCD term is the sum over all ordered pairs of classes i, j that the teacher sees in the
batch of the mean of d_i - d_j, with d_c = t+_c - t-_c. The pairs (i, j) and (j, i) cancel, so IT IS
ZERO FOR EVERY PROMPT and its weight of 0.1 has no effect. By default there is none here. With
`pcd_weight` it is the mean over these pairs of the mean square of d_i - d_j, which asks all classes
to differ from their negatives in the same direction; that form is ours.

How we differ else: the code scales the teacher's cosines with the student's logit scale; here both
have the same. It saves only the ten largest soft labels of a region; here all classes count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.text_tokens import context_init
from fedprompt.config.fields import option
from fedprompt.config.search import log_range
from fedprompt.data.features.inputs import Inputs
from fedprompt.errors import UserError
from fedprompt.methods.base import Batch, Method, Task, Tensors
from fedprompt.methods.parts.losses import cosine_logits, labelled_cross_entropy, masked_mean
from fedprompt.methods.parts.prompts import PromptConfig, PromptSource
from fedprompt.rng import normal

TINY = 1e-6
"""What the authors' code adds to the teacher's probabilities before their logarithm."""
ENSEMBLE = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
"""The seven templates that CLIP's authors chose for ImageNet (Radford et al., ICML 2021)."""


@dataclass(frozen=True)
class FDBPLConfig(PromptConfig):
    """Defaults: the code's contexts and weights; the teacher's templates are ours."""

    learns_without_labels = True

    context_tokens: int = option(4, "context tokens M of each prompt", ge=1)
    context_init: str | None = option("a photo of a", "words to start from; null = random")
    negative_init: str | None = option(
        "a photo of no", "words that the negative prompt starts from; null = random"
    )
    teacher_templates: list[str] = option(
        list(ENSEMBLE), "sentences of the teacher; {} stands for the class name"
    )
    cosine_weight: float = option(1e-3, "weight of cos(z+, z-)", ge=0, search=log_range(1e-4, 1e-1))
    pcd_weight: float = option(
        0.0, "weight of the PCD term in our form; that of the code is always zero", ge=0
    )
    label_weight: float = option(0.0, "weight of the cross-entropy of known labels", ge=0)

    def check(self) -> None:
        """Refuse a teacher without sentences, and sentences without a place for the name."""
        if not self.teacher_templates:
            raise UserError("'teacher_templates' is empty; give at least one, e.g. 'art of a {}.'.")
        for template in self.teacher_templates:
            if template.count("{}") != 1:
                raise UserError(f"'teacher_templates': '{template}' must contain {{}} once.")


class FDBPL(Method):
    """`ctx` and `negative` (M, d) are shared; nothing is private."""

    name = "fdbpl"
    source = "Zhang et al., ESWA 2025"
    Config = FDBPLConfig

    def __init__(self, config: FDBPLConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.cfg = config
        self.prompts = PromptSource.of(config, clip, task)
        self.teacher_CD = clip.zero_shot_classifier(task.class_names, config.teacher_templates)
        # With a single class there is no entropy, and the teacher is always sure.
        self.largest_entropy = math.log(max(2, len(task.class_names)))

    def init_shared(self, seed: int) -> Tensors:
        """`ctx` (M, d) and `negative` (M, d)."""
        tokens = self.cfg.context_tokens
        shape = (tokens, self.clip.text.width)
        draw = normal(shape, self.cfg.init_std, seed, "init", "negative")
        return {
            "ctx": self.prompts.start(seed, "init", "shared"),
            "negative": context_init(self.clip, self.cfg.negative_init, tokens, draw),
        }

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """`classes`, and in training `negative`: class features (K, C, D)."""
        if not torch.is_grad_enabled():
            return {"classes": self.prompts.classes(shared["ctx"])}
        both_K2CD = self.prompts.classes(torch.stack([shared["ctx"], shared["negative"]], dim=1))
        return {"classes": both_K2CD[:, 0], "negative": both_K2CD[:, 1]}

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """Cosine logits (K, B, C) of the positive prompt."""
        return cosine_logits(self.clip, inputs.features, encoded["classes"])

    def loss_terms(
        self, shared: Tensors, private: Tensors, encoded: Tensors, batch: Batch
    ) -> dict[str, Tensor]:
        """`ce`, `distill`, `negative` and `cosine`, weighted; `pcd` too if it has a weight."""
        features, mask_KB = batch.inputs.features, batch.mask_KB
        z_plus = self.logits(encoded, batch.inputs)
        z_minus = cosine_logits(self.clip, features, encoded["negative"])
        teacher_KBC = cosine_logits(self.clip, features, self.teacher_CD)
        log_t, log_s = teacher_KBC.log_softmax(-1), z_plus.log_softmax(-1)
        p_t = log_t.exp()
        w_KB = 1 + (p_t * torch.log(p_t + TINY)).sum(-1) / self.largest_entropy
        # KL(T || S) + KL(S || T) = sum_c (T_c - S_c) (log T_c - log S_c).
        both_ways_KB = ((p_t - log_s.exp()) * (log_t - log_s)).sum(-1)
        log_minus = z_minus.log_softmax(-1)
        entropy_KB = -(log_minus.exp() * log_minus).sum(-1)
        cosine_KB = F.cosine_similarity(z_plus, z_minus, dim=-1)
        terms = {
            "ce": self.cfg.label_weight * labelled_cross_entropy(z_plus, batch),
            "distill": masked_mean(w_KB * both_ways_KB / 2, mask_KB),
            "negative": -masked_mean((1 - w_KB) * entropy_KB, mask_KB),
            "cosine": self.cfg.cosine_weight * masked_mean(w_KB * cosine_KB, mask_KB),
        }
        if self.cfg.pcd_weight > 0:
            difference_KCD = encoded["classes"] - encoded["negative"]
            seen_KC = _seen(teacher_KBC, mask_KB)
            terms["pcd"] = self.cfg.pcd_weight * _spread(difference_KCD, seen_KC)
        return terms


def _seen(teacher_KBC: Tensor, mask_KB: Tensor) -> Tensor:
    """Which classes the teacher sees in a client's batch: booleans (K, C)."""
    best_KB = teacher_KBC.argmax(-1)
    classes_C = torch.arange(teacher_KBC.shape[-1], device=best_KB.device)
    return ((best_KB[..., None] == classes_C) & mask_KB[..., None]).any(1)


def _spread(d_KCD: Tensor, seen_KC: Tensor) -> Tensor:
    """Mean over ordered pairs of seen classes of mean (d_i - d_j)^2: (K,), 0 for a single class."""
    # The mean squared difference of all pairs is twice the sample variance.
    weight_KC1 = seen_KC.to(d_KCD.dtype)[..., None]
    count_K = weight_KC1.sum((1, 2))
    mean_K1D = (weight_KC1 * d_KCD).sum(1, keepdim=True) / count_K[:, None, None].clamp(min=1)
    squares_K = (weight_KC1 * (d_KCD - mean_K1D)).square().sum(1).mean(-1)
    return 2 * squares_K / (count_K - 1).clamp(min=1)
