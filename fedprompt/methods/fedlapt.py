"""FedLAPT: one context for classes and one for other words, trained on mixed features.

Sources: LAPT: Label-driven Automated Prompt Tuning for OOD Detection with Vision-Language Models
(Zhang, Zhu, He, Zhang, ECCV 2024, arXiv 2407.08966) for the method; FOCoOp (Liao et al., ICML 2025,
arXiv 2506.16218; code PengyangZhou/FOCoOp, commit f30f6f3) for the federation, of which it is a
baseline. E words that are far from all class names (`fedprompt.backbone.negative_words`) stand
beside the C class names in the softmax. Image features v of class y are mixed with CLIP's text
features t of the same class under one of the data set's templates, drawn per image,

    x = (lambda v + (1 - lambda) t_y) / |.|,      loss = w CE(x over all C + E columns),

with one lambda per batch from Beta(a, a), of which the smaller of lambda and 1 - lambda is taken:
most of x is text. Both contexts are shared and averaged, 16,384 numbers for 16 tokens of 512;
nothing is private. A model's novelty is the probability of the words, which the `ood` protocol
reports as "novelty head".

Defaults are those of the federated code (a = 0.1, w = 0.5, 100 words), with the two contexts of
LAPT (`prompttype=dis_aware`).

TRAPS of that code, which are not reproduced: its loss and its step stand behind the loop over
batches, so an epoch makes ONE step, on the last batch; `prompttype` is `unified` by default, which
makes both contexts one tensor.

How we differ: LAPT trains on images that it generates or finds on the web by the class names; as in
the federated code, ours are the clients' own. LAPT also mixes images of different classes towards
the words (cross-distribution mixing), which the federated code leaves out by default. lambda is one
of `LEVELS` quantiles of its distribution, all equally likely. The words come from our own list.

Because most of x is text, it learns to tell texts apart more than images: on the embedded scenes,
whose small CLIP has a wide gap between both, the loss of test images does not fall.

Suffixes: K clients, B images, C classes, E words, T templates, D joint embedding, M tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import betaincinv
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.negative_words import candidates
from fedprompt.config.fields import option
from fedprompt.config.search import log_range
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import Batch, Method, Task, Tensors
from fedprompt.methods.parts.losses import cosine_logits, cross_entropy
from fedprompt.methods.parts.negatives import COUNT, chosen_words, joint_logits, share_of_negatives
from fedprompt.methods.parts.prompts import PromptSource, RandomPromptConfig

LEVELS = 1024
"""Values that lambda can take."""


@dataclass(frozen=True)
class FedLAPTConfig(RandomPromptConfig):
    """Defaults: the federated code's."""

    negatives: int = option(100, "words E that name no class", ge=1)
    mix: float = option(
        0.1, "parameter a of Beta(a, a), from which lambda is drawn", gt=0,
        search=log_range(0.05, 2),
    )  # fmt: skip
    weight: float = option(0.5, "weight w of the loss", gt=0)


class FedLAPT(Method):
    """`ctx` (M, d) and `ctx_ood` (M, d) are shared; nothing is private."""

    name = "fedlapt"
    source = "Zhang et al., ECCV 2024; Liao et al., ICML 2025 (baseline)"
    Config = FedLAPTConfig

    def __init__(self, config: FedLAPTConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.cfg = config
        candidates(task.class_names, config.negatives, COUNT)
        self.of_classes = PromptSource.of(config, clip, task)
        # Beta(a, a) is symmetric, so the smaller half is its lower half.
        middles = (np.arange(LEVELS) + 0.5) / (2 * LEVELS)
        levels = torch.from_numpy(betaincinv(config.mix, config.mix, middles))
        self.levels = levels.float().to(clip.device)

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The E words."""
        return chosen_words(self.clip, self.task.class_names, self.cfg.negatives)

    @cached_property
    def of_words(self) -> PromptSource:
        """The source of the words' context."""
        return PromptSource.of(self.cfg, self.clip, Task(self.words))

    @cached_property
    def texts_CTD(self) -> Tensor:
        """CLIP's own features of the class names under each template; read in training only."""
        names = self.task.class_names
        each = [self.clip.zero_shot_classifier(names, [t]) for t in self.task.templates]
        return torch.stack(each, dim=1)

    def init_shared(self, seed: int) -> Tensors:
        """`ctx` (M, d) and `ctx_ood` (M, d)."""
        return {
            "ctx": self.of_classes.start(seed, "init", "shared"),
            "ctx_ood": self.of_classes.start(seed, "init", "words"),
        }

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """`classes` (K, C, D) and `negatives` (K, E, D)."""
        return {
            "classes": self.of_classes.classes(shared["ctx"]),
            "negatives": self.of_words.classes(shared["ctx_ood"]),
        }

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """Cosine logits (K, B, C) of the class names."""
        return cosine_logits(self.clip, inputs.features, encoded["classes"])

    def novelty(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """The probability of the words, (K, B)."""
        return share_of_negatives(
            self.clip, inputs.features, encoded["classes"], encoded["negatives"]
        )

    def loss_terms(
        self, shared: Tensors, private: Tensors, encoded: Tensors, batch: Batch
    ) -> dict[str, Tensor]:
        """`ce` of the mixed features over classes and words, weighted."""
        mixed_KBD = self.mixed(batch)
        logits = joint_logits(self.clip, mixed_KBD, encoded["classes"], encoded["negatives"])
        return {"ce": self.cfg.weight * cross_entropy(logits, batch)}

    def mixed(self, batch: Batch) -> Tensor:
        """Features (K, B, D) between each image and a text of its class."""
        templates = self.texts_CTD.shape[1]
        drawn_KB = batch.uniform((batch.labels_KB.shape[1],), "template")
        # A draw of U[0, 1) never reaches the number of templates.
        chosen_KB = (drawn_KB * templates).long()
        texts_KBD = self.texts_CTD[batch.labels_KB, chosen_KB]
        level_K1 = (batch.uniform((1,), "lambda") * LEVELS).long()
        lambda_K11 = self.levels[level_K1][..., None]
        return F.normalize(
            lambda_K11 * batch.inputs.features + (1 - lambda_K11) * texts_KBD, dim=-1
        )
