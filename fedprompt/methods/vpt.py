"""VPT: visual prompts only, with the class features of a hand-written text.

Source: Visual Prompt Tuning (Jia et al., ECCV 2022, arXiv 2203.12119): M learned tokens at the
input of the first layer (VPT-shallow, depth 1) or of every layer (VPT-deep), where they replace the
output of the previous layer at their positions. The application to CLIP is that of MaPLe's public
code (trainers/vpt.py of muzairkhattak/multimodal-prompt-learning, against which it is checked):
prompts behind the patches and before `ln_pre`, N(0, 0.02^2); the frozen features of "a photo of a
{}." as classifier; cosine logits times exp(logit_scale), cross-entropy.

`init: vpt` starts as the first paper's code does (KMnP/vpt): uniform within plus and minus

    sqrt(6 / (3 p^2 + w)),    p the patch size, w the tower's width.

There the prompts stand before the patches, which makes no difference, since they have no positional
embedding.

How we differ: the papers use one machine; here the prompts are averaged over clients. The first
paper's learned linear head and prompt dropout (0 by default) are left out: the head is the text. We
use float32 where the code rounds prompts to half precision. The depth is at most the number of
layers. The code's first epoch has the rate 1e-5, and its loader leaves out the last partial batch
of an epoch; ours does neither (docs/concepts.md, "Local training").
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.vision_tower import VisionTower
from fedprompt.config.fields import option
from fedprompt.data.features.inputs import Inputs
from fedprompt.errors import UserError
from fedprompt.methods.base import Method, MethodConfig, Task, Tensors
from fedprompt.methods.parts.deep_prompts import layers_within
from fedprompt.methods.parts.losses import cosine_logits
from fedprompt.rng import normal, uniform


@dataclass(frozen=True)
class VPTConfig(MethodConfig):
    """Defaults: MaPLe's code, 8 tokens in all 12 layers; `depth: 1` is VPT-shallow."""

    tokens: int = option(8, "visual tokens per layer", ge=1)
    depth: int = option(12, "image layers with prompts, the first counts", ge=1)
    template: str | None = option("a photo of a {}.", "text of a class; null = the data set's own")
    init: Literal["normal", "vpt"] = option("normal", "N(0, init_std^2), or VPT's uniform start")
    init_std: float = option(0.02, "standard deviation of the random start", gt=0)

    def check(self) -> None:
        """Refuse a text without a place for the class name."""
        if self.template is not None and self.template.count("{}") != 1:
            raise UserError(f"template is '{self.template}'; it must have one {{}} for the class.")


class VPT(Method):
    """`visual` (J, M, w) is shared; nothing is private."""

    name = "vpt"
    source = "Jia et al., ECCV 2022"
    Config = VPTConfig
    multi_label = True
    needs = frozenset({"features", "pixels"})
    images_at_once = 256

    def __init__(self, config: VPTConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.vision = VisionTower(clip)
        layers = layers_within("image", config.depth, self.vision.layers)
        self.shape = (layers, config.tokens, self.vision.width)
        templates = (config.template,) if config.template else task.templates
        # The text is not learned: one frozen set of class features serves all clients and rounds.
        self.classes_1CD = clip.zero_shot_classifier(task.class_names, templates)[None]

    def init_shared(self, seed: int) -> Tensors:
        """`visual` (J, M, w)."""
        key = (seed, "init", "shared", "visual")
        if self.config.init == "normal":
            return {"visual": normal(self.shape, self.config.init_std, *key)}
        # VPT's bound sqrt(6 / (3 p^2 + w)), for patches that need not be square.
        height, width = self.vision.patch_size
        bound = math.sqrt(6 / (3 * height * width + self.vision.width))
        return {"visual": bound * (2 * uniform(self.shape, *key) - 1)}

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """The fixed `classes` (1, C, D) and the visual prompts (K, J, M, w)."""
        return {"classes": self.classes_1CD, "visual": shared["visual"]}

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """Cosine logits (K, B, C) of the prompted image features."""
        assert inputs.pixels is not None
        images_KBD = self.vision.features(inputs.pixels, encoded["visual"])
        return cosine_logits(self.clip, images_KBD, encoded["classes"])

    def class_embeddings(self, encoded: Tensors) -> Tensor | None:
        """None: prompts change the image features."""
        return None
