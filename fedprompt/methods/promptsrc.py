"""PromptSRC: deep prompts in both towers that stay close to the frozen CLIP.

Source: Self-regulating Prompts: Foundational Model Adaptation without Forgetting (Khattak et al.,
ICCV 2023, arXiv 2307.06948). Each of the first J layers of either tower has M separate prompt
tokens. With t, v the prompted class and image features, z their logits, and t0, v0, z0 those of the
frozen CLIP, all features L2-normalised:

    L = CE(z) + 25 mean|t - t0| + 10 mean|v - v0| + KL(softmax z0 || softmax z) / C

t0 is the normalised mean over 60 templates of features that are not normalised. Means run over
classes or images and over dimensions. Checked against the authors' code
(muzairkhattak/PromptSRC), whose KL is summed and divided by the number of logits: `kl_norm: numel`,
the mean over images divided by the number of classes C; `batchmean` does not divide by C, so that
the weight does not depend on the length of the class list.

The paper's third part, the average of all epochs' prompts with Gaussian weights, is computed on the
server over rounds, by the strategy `strategies/gaussian.py`, which `strategy: auto` selects.

How we differ: nothing is private, all prompts are averaged over clients (the paper uses one
machine). v0 are the cached features of the same view of an image. We use float32 where the code
rounds prompts and t0 to half precision; J is at most the number of layers of each tower. The code's
first epoch has the rate 1e-5, and its loader leaves out the last partial batch of an epoch; ours
does neither (docs/concepts.md, "Local training").
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources
from types import MappingProxyType
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.text_tokens import token_count
from fedprompt.config.fields import option
from fedprompt.config.search import log_range
from fedprompt.methods.base import Batch, RoundInfo, Task, Tensors
from fedprompt.methods.ivlp import IVLP, IVLPConfig
from fedprompt.methods.parts.losses import cosine_logits, cross_entropy, masked_mean
from fedprompt.methods.parts.prompts import PromptSource


@dataclass(frozen=True)
class PromptSRCConfig(IVLPConfig):
    """Defaults: the authors' base-to-new setting, 4 + 4 tokens in 9 layers."""

    default_strategy = MappingProxyType({"name": "gaussian"})

    text_tokens: int = option(4, "text tokens per layer", ge=1)
    visual_tokens: int = option(4, "visual tokens per layer", ge=1)
    text_depth: int = option(9, "text layers with prompts, the first counts", ge=1)
    visual_depth: int = option(9, "image layers with prompts, the first counts", ge=1)
    text_weight: float = option(
        25.0, "weight of the text features' distance", ge=0, search=log_range(1, 50)
    )
    image_weight: float = option(
        10.0, "weight of the image features' distance", ge=0, search=log_range(1, 50)
    )
    logits_weight: float = option(
        1.0, "weight of the KL divergence", ge=0, search=log_range(0.1, 5)
    )
    kl_norm: Literal["numel", "batchmean"] = option("numel", "KL per logit, or per image")


class PromptSRC(IVLP):
    """IVLP's prompts `text` and `visual`, with three more terms."""

    name = "promptsrc"
    source = "Khattak et al., ICCV 2023"
    Config = PromptSRCConfig

    def start_round(
        self, shared: Tensors, private: Tensors, round_info: RoundInfo
    ) -> tuple[Tensors, Tensors]:
        """Nothing changes; the frozen CLIP's class features are ready before the first step."""
        self.frozen_classes  # noqa: B018 - computed on its first use, which no step should pay for
        return super().start_round(shared, private, round_info)

    def loss_terms(
        self, shared: Tensors, private: Tensors, encoded: Tensors, batch: Batch
    ) -> dict[str, Tensor]:
        """`ce`, `text`, `image` and `logits`, each (K,) and already weighted."""
        classes_KCD, frozen_KBD = encoded["classes"], batch.inputs.features
        assert batch.inputs.pixels is not None
        images_KBD = self.vision.features(batch.inputs.pixels, encoded["visual"])
        logits_KBC = cosine_logits(self.clip, images_KBD, classes_KCD)
        frozen_KBC = cosine_logits(self.clip, frozen_KBD, self.frozen_classes)
        # mean|v - v0| over dimensions; the mean over images follows, without the padding.
        image_KB = (images_KBD - frozen_KBD).abs().mean(-1)
        # KL(softmax z0 || softmax z): the frozen distribution is the reference.
        log_p, log_q = logits_KBC.log_softmax(-1), frozen_KBC.log_softmax(-1)
        kl_KB = (log_q.exp() * (log_q - log_p)).sum(-1)
        if self.config.kl_norm == "numel":
            # The public code divides by the number of logits; the number of images follows below.
            kl_KB = kl_KB / logits_KBC.shape[-1]
        text_K = (classes_KCD - self.frozen_classes).abs().mean(dim=(-1, -2))
        return {
            "ce": cross_entropy(logits_KBC, batch),
            "text": self.config.text_weight * text_K,
            "image": self.config.image_weight * masked_mean(image_KB, batch.mask_KB),
            "logits": self.config.logits_weight * masked_mean(kl_KB, batch.mask_KB),
        }

    @cached_property
    def frozen_classes(self) -> Tensor:
        """t0 (C, D): class features of the frozen CLIP, over all templates.

        They cost 60 passes through the text tower, so they are computed on the first use only.
        """
        return template_mean(self.clip, self.task.class_names, imagenet_templates())


@cache
def imagenet_templates() -> tuple[str, ...]:
    """The 60 templates of the authors' code."""
    path = resources.files("fedprompt.backbone") / "assets" / "imagenet_templates.json"
    return tuple(json.loads(path.read_text(encoding="utf-8"))["templates"])


@torch.no_grad()
def template_mean(
    clip: FrozenCLIP, class_names: tuple[str, ...], templates: tuple[str, ...]
) -> Tensor:
    """Class features over many templates, averaged before they are normalised.

    A template's words before its `{}` are a context that all classes share, so the text tower
    evaluates them once. Every template must have such words and end in a full stop.

    Args:
        clip: the frozen backbone.
        class_names: C names.
        templates: sentences with one `{}` each.

    Returns:
        L2-normalised features (C, D).
    """
    features = []
    for template in templates:
        # The tower adds a full stop behind every class name itself.
        before, after = template.removesuffix(".").split("{}")
        tokens = token_count(clip, before)
        names = Task(tuple(name + after for name in class_names))
        context = PromptSource(clip, names, tokens, init_text=before.strip())
        # `tower`, not `classes`: the features must not be normalised before the mean.
        features.append(context.tower(context.start(0).to(clip.device)))
    return F.normalize(torch.stack(features).mean(0), dim=-1)
