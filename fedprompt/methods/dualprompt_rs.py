"""DualPrompt for remote sensing: deep prompts whose coupling changes direction from layer to layer.

Source: DualPrompt: Leveraging Vision-Language Models and Federated Learning for Satellite Image
Classification (tahaspc82442/federated_multi_modal; README and code, no paper known to us). Not
DualPrompt of continual learning (Wang et al., ECCV 2022), hence the name.

It is MaPLe with two directions. Of the J layers with prompts, layer 0 and all odd layers learn text
prompts P_j (M, d), and the image tower gets F_j(P_j) = P_j W_j^T + b_j there; the even layers from
2 on learn image prompts Q_j (M, w), and the text tower gets G_j(Q_j). With v the feature of an
image, t_c that of a class, both L2-normalised, and y the label:

    logits_c = s cos(v, t_c),    L = CE + lambda (1 - mean_i cos(v_i, t_{y_i}))

P, Q, F and G are shared (3,556,096 numbers on ViT-B/16), and nothing is private: the code averages
its whole state dict. Its mean has equal weights at first; a later version weights clients by the
entropy of their class counts, which is the same for k images of every class.

s is 1 / 0.07 and not CLIP's own 100: the code declares a scale of its own, starts it there and
clamps it at 100, but freezes it with all else outside the prompt learner, so that it is a constant.
`logit_scale: null` takes CLIP's.

How we differ: CLIP stays frozen, as the README says. The code also trains all layer norms and the
whole last block of both towers. In training it feeds machine-written captions of the images to the
image tower, which we do not have. It clips gradients at norm 1 (`training.clip_grad_norm`). The
widths are the towers' own, not 512 and 768, and J is at most the layers of either tower.

Faults of the public code that are not reproduced: the caption tokens of ALL images of a batch join
the sequence of each of them, again in every deep layer (an image's loss depends on its neighbours),
and tests have none; the clients of the later version share one CLIP object, so layer norms and last
blocks pass from client to client within a round, before they are averaged; the average replaces NaN
by 0 and infinity by 1e4 and rounds to half precision; a projection `proj_vis_to_lang` is averaged
but never used; the cosine schedule is rebuilt every round for 2 epochs and runs far beyond them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.vision_tower import VisionTower
from fedprompt.config.fields import option
from fedprompt.config.search import Range
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import UNIFORM_AVERAGE, Batch, Method, Task, Tensors
from fedprompt.methods.parts.alignment import image_text_distance
from fedprompt.methods.parts.deep_prompts import DeepText, coupled, layers_within
from fedprompt.methods.parts.linear import linear_start
from fedprompt.methods.parts.losses import cross_entropy
from fedprompt.methods.parts.prompts import PromptConfig
from fedprompt.rng import normal


@dataclass(frozen=True)
class DualPromptConfig(PromptConfig):
    """The public code's values; it has several, see the comments."""

    default_strategy = UNIFORM_AVERAGE

    context_tokens: int = option(2, "tokens M of every prompt", ge=1)
    # `train.py` of the first commit; later ones have 3, their YAML 11; their sweep tries 3 to 9.
    depth: int = option(9, "layers J with prompts, the first counts; at most the tower's", ge=1)
    # The YAML; `train.py` of later commits has "a satellite image of a".
    context_init: str | None = option("a photo of a", "start words; those after M tokens stay")
    # The first commit and the later centralised default; the sweep tries 0.1 to 0.9.
    alignment: float = option(
        0.5, "weight of the distance between image and text", ge=0, search=Range(0.1, 0.9)
    )
    logit_scale: float | None = option(1 / 0.07, "factor of the cosines; null = CLIP's own", gt=0)


class DualPrompt(Method):
    """Shared are prompts and couplings of both directions, Jt + Jv = J layers; nothing is private.

    `text` (Jt, M, d), `to_visual.weight` (Jt, w, d), `to_visual.bias` (Jt, w), and, with J > 2,
    `visual` (Jv, M, w), `to_text.weight` (Jv, d, w), `to_text.bias` (Jv, d).
    """

    name = "dualprompt_rs"
    source = "federated_multi_modal (public code)"
    Config = DualPromptConfig
    needs = frozenset({"features", "pixels"})
    images_at_once = 256

    def __init__(self, config: DualPromptConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.cfg = config
        self.scale = clip.logit_scale if config.logit_scale is None else config.logit_scale
        self.vision = VisionTower(clip)
        depth = layers_within("image", config.depth, self.vision.layers)
        self.text = DeepText(
            clip, task, config.context_tokens, depth, config.context_init, config.init_std
        )
        # Layer 0 is coupled like MaPLe's; the directions alternate from layer 1 on.
        self.text_layers = [j for j in range(self.text.depth) if j == 0 or j % 2]
        self.visual_layers = [j for j in range(self.text.depth) if j not in self.text_layers]

    def init_shared(self, seed: int) -> Tensors:
        """Prompts from the start words and from N(0, init_std^2), couplings as torch's linear."""
        d, w, key = self.clip.text.width, self.vision.width, ("init", "shared")
        start = {"text": self.text.start(seed, *key)[self.text_layers]}
        start |= _stacked(
            "to_visual", [linear_start(f"F_{j}", w, d, seed, *key) for j in self.text_layers]
        )
        if not self.visual_layers:
            return start
        shape = (len(self.visual_layers), self.cfg.context_tokens, w)
        start["visual"] = normal(shape, self.cfg.init_std, seed, *key, "visual")
        return start | _stacked(
            "to_text", [linear_start(f"G_{j}", d, w, seed, *key) for j in self.visual_layers]
        )

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """`classes` (K, C, D), and `visual`, the prompts of the image tower (K, J, M, w)."""
        text, visual = self.prompts(shared)
        return {"classes": self.text.classes(text), "visual": visual}

    def prompts(self, shared: Tensors) -> tuple[Tensor, Tensor]:
        """The prompts of all layers, learned or coupled: text (K, J, M, d), image (K, J, M, w)."""
        text = shared["text"]
        visual = coupled(text, shared["to_visual.weight"], shared["to_visual.bias"])
        if not self.visual_layers:
            return text, visual
        to_text = coupled(shared["visual"], shared["to_text.weight"], shared["to_text.bias"])
        return self._by_layer(text, to_text), self._by_layer(visual, shared["visual"])

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """Cosines (K, B, C) of the prompted features, times the method's own scale."""
        return self._logits(self._images(encoded, inputs), encoded)

    def loss_terms(
        self, shared: Tensors, private: Tensors, encoded: Tensors, batch: Batch
    ) -> dict[str, Tensor]:
        """`ce`, and `alignment` if it has a weight."""
        images_KBD = self._images(encoded, batch.inputs)
        terms = {"ce": cross_entropy(self._logits(images_KBD, encoded), batch)}
        if self.cfg.alignment > 0:
            distance_K = image_text_distance(images_KBD, encoded["classes"], batch)
            terms["alignment"] = self.cfg.alignment * distance_K
        return terms

    def class_embeddings(self, encoded: Tensors) -> Tensor | None:
        """None: prompts change the image features."""
        return None

    def _images(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """L2-normalised features (K, B, D) of the prompted images."""
        assert inputs.pixels is not None
        return self.vision.features(inputs.pixels, encoded["visual"])

    def _logits(self, images_KBD: Tensor, encoded: Tensors) -> Tensor:
        return self.scale * (images_KBD @ encoded["classes"].transpose(-1, -2))

    def _by_layer(self, at_text: Tensor, at_visual: Tensor) -> Tensor:
        """The prompts of one tower (K, J, M, ...) in the order of its layers.

        Args:
            at_text: those of the layers that learn text prompts, (K, Jt, M, ...).
            at_visual: those of the layers that learn image prompts, (K, Jv, M, ...).
        """
        rows = dict(zip(self.text_layers, at_text.unbind(1), strict=True))
        rows |= dict(zip(self.visual_layers, at_visual.unbind(1), strict=True))
        return torch.stack([rows[j] for j in range(self.text.depth)], dim=1)


def _stacked(name: str, layers: list[Tensors]) -> Tensors:
    """`name.weight` (J, o, i) and `name.bias` (J, o) of linear layers."""
    weights, biases = zip(*(layer.values() for layer in layers), strict=True)
    return {f"{name}.weight": torch.stack(weights), f"{name}.bias": torch.stack(biases)}
