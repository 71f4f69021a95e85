"""CoCoOp: a small network shifts the context depending on the image.

Source: Conditional Prompt Learning for Vision-Language Models (Zhou et al., CVPR 2022, arXiv
2203.05557): v_m(x) = v_m + pi, pi = h(x), h the Meta-Net Linear(D, D / 16), ReLU, Linear(D / 16, d)
on the L2-normalised image feature, so every image has its own class features. Checked against the
authors' `trainers/cocoop.py`.

How we differ: the prompts of many images pass through the text tower together (one prompt per
image), in parts of bounded size (`PromptSource.classes_of_many`). N images still cost N x C text
sequences: the paper trains with `training.batch_size=1`. The code's first epoch has the rate 1e-5,
and its loader leaves out the last partial batch of an epoch; ours does neither (docs/concepts.md,
"Local training").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.fields import option
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import Method, Task, Tensors
from fedprompt.methods.parts.linear import linear, linear_start
from fedprompt.methods.parts.losses import per_image_logits
from fedprompt.methods.parts.prompts import PromptConfig, PromptSource


@dataclass(frozen=True)
class CoCoOpConfig(PromptConfig):
    """Defaults: the paper's 4 context tokens "a photo of a" and 16-fold bottleneck."""

    supports_image_noise = True

    context_tokens: int = option(4, "context tokens M", ge=1)
    context_init: str | None = option("a photo of a", "words to start from; null = random")
    bottleneck: int = option(16, "the Meta-Net's hidden layer is D / bottleneck wide", ge=1)


class CoCoOp(Method):
    """Context and Meta-Net are shared; nothing is private."""

    name = "cocoop"
    source = "Zhou et al., CVPR 2022"
    Config = CoCoOpConfig
    images_at_once = 256

    def __init__(self, config: CoCoOpConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.prompts = PromptSource.of(config, clip, task)
        self.hidden = max(1, clip.embed_dim // config.bottleneck)

    def init_shared(self, seed: int) -> Tensors:
        """`ctx` (M, d), and `linear1`, `linear2` of the Meta-Net as torch.nn.Linear starts."""
        embed, width = self.clip.embed_dim, self.clip.text.width
        return {
            "ctx": self.prompts.start(seed, "init", "shared"),
            **linear_start("linear1", self.hidden, embed, seed, "init", "shared"),
            **linear_start("linear2", width, self.hidden, seed, "init", "shared"),
        }

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """The shared tensors: nothing else is the same for all images."""
        return dict(shared)

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """Cosine logits (K, B, C), each image with its own class features."""
        context_KBMd = self.contexts(encoded, inputs)
        classes_KBCD = self.prompts.classes_per_image(context_KBMd)
        return per_image_logits(self.clip, inputs.features, classes_KBCD)

    def contexts(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """The context of every image, (K, B, M, d)."""
        # v_m(x) = v_m + pi: one shift pi per image, the same for all M tokens.
        return encoded["ctx"][:, None] + self.meta_net(encoded, inputs.features)[:, :, None]

    def meta_net(self, encoded: Tensors, features: Tensor) -> Tensor:
        """h: (K, ..., d) of features (K, ..., D)."""
        hidden = F.relu(linear(features, encoded["linear1.weight"], encoded["linear1.bias"]))
        return linear(hidden, encoded["linear2.weight"], encoded["linear2.bias"])
