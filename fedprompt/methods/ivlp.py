"""IVLP: independent deep prompts in both towers, learned by all clients.

Source: independent vision-language prompting, the baseline of MaPLe (Khattak et al., CVPR 2023,
arXiv 2210.03117) and of PromptSRC (Khattak et al., ICCV 2023, arXiv 2307.06948): each of the first
J layers of either tower has M separate prompt tokens; cosine logits times exp(logit_scale),
cross-entropy. Checked against the authors' code (trainers/independentVL.py and clip/model.py of
muzairkhattak/multimodal-prompt-learning and muzairkhattak/PromptSRC): the first text prompt starts
from words, all others from N(0, 0.02^2); visual prompts follow the patches, before `ln_pre`; deeper
ones replace the output of the previous layer at their positions.

How we differ: the papers use one machine; here all prompts are averaged over clients and nothing is
private. We use float32 where the code rounds prompts to half precision. J is at most the number of
layers of each tower, and start words that do not split after M tokens are refused
(`deep_prompts.py`). The code's first epoch has the rate 1e-5, and its loader leaves out the last
partial batch of an epoch; ours does neither (docs/concepts.md, "Local training").
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.vision_tower import VisionTower
from fedprompt.config.fields import option
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import Method, MethodConfig, Task, Tensors
from fedprompt.methods.parts.deep_prompts import DeepText, layers_within
from fedprompt.methods.parts.losses import cosine_logits
from fedprompt.rng import normal


@dataclass(frozen=True)
class IVLPConfig(MethodConfig):
    """Defaults: MaPLe's code, 2 + 2 tokens in all 12 layers (PromptSRC's has 4 + 4 in 9)."""

    text_tokens: int = option(2, "text tokens per layer", ge=1)
    visual_tokens: int = option(2, "visual tokens per layer", ge=1)
    text_depth: int = option(12, "text layers with prompts, the first counts", ge=1)
    visual_depth: int = option(12, "image layers with prompts, the first counts", ge=1)
    context_init: str | None = option("a photo of a", "start words; those after M tokens stay")
    init_std: float = option(0.02, "standard deviation of the random starts", gt=0)


class IVLP(Method):
    """`text` (J, M, d) and `visual` (J, M, w) are shared; nothing is private."""

    name = "ivlp"
    source = "Khattak et al., ICCV 2023 (its baseline)"
    Config = IVLPConfig
    multi_label = True
    needs = frozenset({"features", "pixels"})
    images_at_once = 256

    def __init__(self, config: IVLPConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.vision = VisionTower(clip)
        self.text = DeepText(
            clip,
            task,
            config.text_tokens,
            config.text_depth,
            config.context_init,
            config.init_std,
        )

    def init_shared(self, seed: int) -> Tensors:
        """`text` starts from words; its deeper layers and `visual` from N(0, init_std^2)."""
        depth = layers_within("image", self.config.visual_depth, self.vision.layers)
        shape = (depth, self.config.visual_tokens, self.vision.width)
        visual = normal(shape, self.config.init_std, seed, "init", "shared", "visual")
        return {"text": self.text.start(seed, "init", "shared"), "visual": visual}

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """`classes` (K, C, D) and the visual prompts (K, J, M, w)."""
        # Visual prompts meet the images in every layer, so they can only be passed on.
        return {"classes": self.text.classes(shared["text"]), "visual": shared["visual"]}

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """Cosine logits (K, B, C) of the prompted image and text features."""
        assert inputs.pixels is not None
        images_KBD = self.vision.features(inputs.pixels, encoded["visual"])
        return cosine_logits(self.clip, images_KBD, encoded["classes"])

    def class_embeddings(self, encoded: Tensors) -> Tensor | None:
        """None: prompts change the image features."""
        return None
