"""PLOT, federated: N contexts per class, matched to an image's patches by optimal transport.

Source: PLOT: Prompt Learning with Optimal Transport for Vision-Language Models (Chen et al., ICLR
2023, arXiv 2210.01253; code CHENGY12/PLOT, plot-coop). N unified contexts give N features per
class; an image is its P patch features. Per image and class, T is the balanced entropic transport
plan of cost 1 - cos (`optimal_transport.py`), and

    logit_c = exp(logit_scale) * sum over n and p of T_np cos(patch_p, t_nc),      loss CE.

No gradient passes through T. Defaults are those of the public code: 16 tokens, eps 0.1, threshold
0.01, at most 100 iterations; N = 4 as in its README. All N contexts are shared and averaged, each
with the contexts of the same index: all clients start from the same ones, so the order is the same.

How we differ: the mean that stops the iteration is over each client's own images. The public code
returns no logits at all if an entry is not a number; here, problems with eps below 1/40 are solved
in float64, so no such entry occurs. Its class-specific contexts and its class names in front or in
the middle of the context work with one prompt only, so neither is offered. It also computes logits
of the pooled image feature and of the mean text feature, and adds them to logit_c on ImageNet, but
on no other data set; we never do. Its training is not federated: 50 epochs of SGD with momentum
0.9, the first of them at the rate 1e-5 (docs/concepts.md, "Local training").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.fields import option
from fedprompt.config.search import log_range
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import Batch, Method, Task, Tensors
from fedprompt.methods.parts.optimal_transport import (
    FLOAT32_EPS,
    SMALLEST_EPS,
    Transport,
    real_images,
)
from fedprompt.methods.parts.prompts import PromptSource, RandomPromptConfig


@dataclass(frozen=True)
class PLOTConfig(RandomPromptConfig):
    """Defaults: plot-coop's."""

    supports_image_noise = True

    prompts: int = option(4, "contexts N per class", ge=1)
    context_tokens: int = option(16, "context tokens M of each", ge=1)
    eps: float = option(
        0.1, "weight of the plan's entropy", ge=SMALLEST_EPS, search=log_range(0.05, 1)
    )
    threshold: float = option(0.01, "mean change at which the iteration stops", gt=0)
    max_iterations: int = option(100, "iterations at most", ge=1)

    @property
    def needs_float64(self) -> bool:
        """With a small eps, whose kernel would leave float32."""
        return self.eps < FLOAT32_EPS


class PLOT(Method):
    """N shared contexts; nothing private."""

    name = "plot"
    source = "Chen et al., ICLR 2023"
    Config: ClassVar[type[Any]] = PLOTConfig
    multi_label = True
    needs = frozenset({"features", "patches"})
    no_graph_reason = "the transport iterates until the device reports that it has converged"
    images_at_once = 128
    """Costs and plans of 100 classes, 4 prompts and 196 patches take 314 kB each per image."""

    def __init__(self, config: Any, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.prompts = PromptSource.of(config, clip, task)
        self.transport = self._transport()

    def _transport(self) -> Transport:
        # FedOTP overrides this to make the problem partial.
        cfg = self.config
        return Transport(cfg.eps, cfg.threshold, cfg.max_iterations)

    def init_shared(self, seed: int) -> Tensors:
        """`ctx` (N, M, d)."""
        # A draw per context: contexts that start alike would get equal gradients and stay alike.
        starts = [self.prompts.start(seed, "init", "shared", n) for n in range(self.config.prompts)]
        return {"ctx": torch.stack(starts)}

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """`prompts`: class features (K, N, C, D) of the contexts (K, N, M, d)."""
        return {"prompts": self.prompts.classes(shared["ctx"])}

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """Transported cosines times exp(logit_scale): (K, B, C). Images of zeros are padding."""
        assert inputs.patches is not None
        return self._logits(encoded, inputs, real_images(inputs.patches))

    def loss_terms(
        self, shared: Tensors, private: Tensors, encoded: Tensors, batch: Batch
    ) -> dict[str, Tensor]:
        """`ce` (K,)."""
        # In training the mask of the batch is known; `logits` has to infer it from the patches.
        return self.label_loss(self._logits(encoded, batch.inputs, batch.mask_KB), batch)

    def _logits(self, encoded: Tensors, inputs: Inputs, real_KB: Tensor) -> Tensor:
        assert inputs.patches is not None
        similarity_KBC = self.transport.similarity(inputs.patches, encoded["prompts"], real_KB)
        return self.clip.logit_scale * similarity_KBC
