"""CLIP-Adapter, federated: a bottleneck on image features, mixed with them and averaged.

Source: CLIP-Adapter: Better Vision-Language Models with Feature Adapters (Gao et al., IJCV 2024,
arXiv 2110.04544; public code: gaopengcuhk/CLIP-Adapter). With v the image feature and t_c the
feature of a hand-written text of class c:

    A(v) = ReLU(W_up ReLU(W_down v))         D -> D/4 -> D, no biases
    v'   = ratio A(v) + (1 - ratio) v
    logits = exp(logit_scale) cos(v', t_c),  loss = cross-entropy

How we differ: the paper is not federated; here both matrices are shared and averaged (131,072
numbers at D = 512) and nothing is private. Only the image adapter is built, as in the public code,
whose width 1,024 (ResNet-50's) is here the backbone's own. Texts are the data set's templates; the
public code has one per data set.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.fields import option
from fedprompt.config.search import Range
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import Method, MethodConfig, Task, Tensors
from fedprompt.methods.parts.adapters import (
    bottleneck,
    bottleneck_start,
    check_template,
    template_classes,
)
from fedprompt.methods.parts.losses import cosine_logits


@dataclass(frozen=True)
class CLIPAdapterConfig(MethodConfig):
    """Defaults: the public code's."""

    supports_image_noise = True

    reduction: int = option(4, "the hidden width is the embedding's divided by this", ge=1)
    ratio: float = option(
        0.2,
        "weight of the adapted feature; the rest is CLIP's own",
        ge=0,
        le=1,
        search=Range(0.05, 0.9),
    )
    template: str | None = option(None, "text with {} for the class; null = the data set's own")

    def check(self) -> None:
        """Refuse a template without a place for the class name."""
        check_template(self.template)


class CLIPAdapter(Method):
    """`adapter.down.weight` (D/4, D) and `adapter.up.weight` (D, D/4) are shared."""

    name = "clip_adapter"
    source = "Gao et al., IJCV 2024"
    Config = CLIPAdapterConfig
    multi_label = True

    def __init__(self, config: CLIPAdapterConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.cfg = config
        self.classes_1CD = template_classes(clip, task.class_names, task.templates, config.template)

    def init_shared(self, seed: int) -> Tensors:
        """Both matrices, as torch.nn.Linear starts them."""
        return bottleneck_start(self.clip.embed_dim, self.cfg.reduction, seed, "init", "shared")

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """The fixed class features (1, C, D), and the adapter's matrices as they are."""
        return {"classes": self.classes_1CD, **shared}

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """Cosine logits (K, B, C) of the mixed features.

        The public code mixes un-normalised features; the result is the same (`bottleneck`).
        """
        v_KBD, ratio = inputs.features, self.cfg.ratio
        # v' = ratio A(v) + (1 - ratio) v.
        mixed_KBD = ratio * bottleneck(v_KBD, encoded) + (1 - ratio) * v_KBD
        return cosine_logits(self.clip, F.normalize(mixed_KBD, dim=-1), encoded["classes"])

    def class_embeddings(self, encoded: Tensors) -> Tensor | None:
        """None: the adapter changes the image features."""
        return None
