"""TRIP: experts' contexts, mixed for each image by how many of its tokens each expert has.

Source: Token-Level Prompt Mixture with Parameter-Free Routing for Federated Domain Generalization
(Gong, Cui, Dong, Nie, Zhu, Chang, IEEE TIP, arXiv 2504.21063); public code GongShuai8210/TRIP.
With E experts V_e and the weights w_e(x) of `fedprompt/backbone/token_routing.py`, which depend on
the frozen image tower alone and are cached with the features,

    V(x) = sum_e w_e(x) V_e        L = CE + alpha CE(zero-shot probabilities, logits)

where the second term is the divergence from zero-shot CLIP up to a constant. Clusters have room for
`capacity` times their share of the tokens in training and for `test_capacity` times in tests.
Shared: the experts, E M d numbers, 65,536 on ViT-B/16 (the paper's 0.065 M). Nothing is private,
and the router has nothing to send. The routing equals the authors' on equal tokens and first
centroids.

How we differ: the experts start from different draws. In the public code all parameters of the list
are made of the same tensor, so that all experts start equal, and before a model is copied they are
one. Its `train.sh` has 32 tokens, the README's table the 0.065 M of 16, which are ours. Zero-shot
probabilities are those of the data set's templates. The code selects the round by validation
accuracy, and also tests a mean of all rounds' experts with weights of a beta density, in which the
untrained start counts; ours is the last round (`strategy=gaussian` averages over rounds). Its rate
falls by 0.8 per round; ours is `training.schedule`. It decodes each image for routing and again in
every epoch.

Each image has a text of its own, as in CoCoOp: N images cost N x C text sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.token_routing import TokenRouting
from fedprompt.config.fields import option
from fedprompt.config.search import Range, log_range
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import Batch, Method, Task, Tensors
from fedprompt.methods.parts.losses import (
    cosine_logits,
    cross_entropy,
    distillation,
    per_image_logits,
)
from fedprompt.methods.parts.prompts import PromptSource, RandomPromptConfig


@dataclass(frozen=True)
class TRIPConfig(RandomPromptConfig):
    """Defaults of the code's `train.sh`, with the number of tokens of its README."""

    supports_image_noise = True

    experts: int = option(8, "experts E", ge=1)
    capacity: float = option(
        1.0, "room of an expert in training, in equal shares of the tokens", ge=1
    )
    test_capacity: float = option(2.0, "the same in tests", ge=1)
    alpha: float = option(
        1.0, "weight of the distillation of zero-shot CLIP", ge=0, search=log_range(0.1, 5)
    )

    @property
    def routing(self) -> TokenRouting:
        """How the tokens of an image are routed."""
        return TokenRouting(self.experts, self.capacity, self.test_capacity)

    @property
    def lr_space(self) -> Range | None:
        """With SGD; the code has AdamW at 5e-4."""
        return log_range(0.0005, 0.5)


class TRIP(Method):
    """`experts` (E, M, d) is shared; nothing is private."""

    name = "trip"
    source = "Gong et al., 2025"
    Config = TRIPConfig
    needs = frozenset({"features", "routing"})
    images_at_once = 256

    def __init__(self, config: TRIPConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.cfg = config
        self.prompts = PromptSource.of(config, clip, task)
        self.zero_shot_CD = clip.zero_shot_classifier(task.class_names, task.templates)
        self.routing = config.routing

    def init_shared(self, seed: int) -> Tensors:
        """`experts` (E, M, d), each with a draw of its own."""
        starts = [
            self.prompts.start(seed, "init", "shared", expert) for expert in range(self.cfg.experts)
        ]
        return {"experts": torch.stack(starts)}

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """The experts: nothing else is the same for all images."""
        return dict(shared)

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """Cosine logits (K, B, C), each image with its own class features."""
        return self._logits(encoded, inputs, 1)

    def loss_terms(
        self, shared: Tensors, private: Tensors, encoded: Tensors, batch: Batch
    ) -> dict[str, Tensor]:
        """`ce` and `distillation` (K,)."""
        logits_KBC = self._logits(encoded, batch.inputs, 0)
        teacher_KBC = cosine_logits(self.clip, batch.inputs.features, self.zero_shot_CD)
        return {
            "ce": cross_entropy(logits_KBC, batch),
            "distillation": self.cfg.alpha * distillation(logits_KBC, teacher_KBC, batch),
        }

    def _logits(self, encoded: Tensors, inputs: Inputs, tests: int) -> Tensor:
        assert inputs.routing is not None
        weights_KBE = inputs.routing[..., tests, :]
        # V(x) = sum_e w_e(x) V_e
        context_KBMd = torch.einsum("kbe,kemd->kbmd", weights_KBE, encoded["experts"])
        classes_KBCD = self.prompts.classes_per_image(context_KBMd)
        return per_image_logits(self.clip, inputs.features, classes_KBCD)
