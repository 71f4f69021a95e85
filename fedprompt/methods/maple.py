"""MaPLe: deep text prompts, and visual prompts that are linear functions of them.

Source: MaPLe: Multi-modal Prompt Learning (Khattak et al., CVPR 2023, arXiv 2210.03117). P_j, M
tokens each, are learned at the inputs of the first J text layers; the image tower gets F_j(P_j) =
P_j W_j^T + b_j after its patches at the same depths; cosine logits, cross-entropy. Checked against
the authors' code (muzairkhattak/multimodal-prompt-learning): P_0 starts from words, the other
prompts from N(0, 0.02^2), F_0 and one F for all deeper layers as torch's linear layers start.

`sharing` selects what is averaged over clients (the paper uses one machine and no federation):

    text          P (9,216 numbers on ViT-B/16); each client keeps its F. The global model has no
                  visual prompts: P with CLIP's own image features.
    factors       P and F (3,555,072 numbers); nothing is private.
    materialised  P and V_j = F_j(P_j) (23,040 numbers); each client keeps its F.

mean(F_k) mean(P_k) is not mean(F_k P_k): `factors` averages the former, `materialised` the latter.
After a `materialised` round a client's own F does not map the average P to the average V. A
constant offset corrects this: within a round, the client's visual prompts are

    V + F_k(P) - A_k,    A_k = F_k(P) at the start of the round,

which start at the average V and have MaPLe's gradients to P and to F_k; their last value is
uploaded. The first round's offset is zero. In evaluation everyone's visual prompts are V itself.

How we differ: we use float32 where the code rounds prompts to half precision; J is at most the
number of layers of either tower; the width of the visual prompts is the tower's, not a fixed 768.
The code's first epoch has the rate 1e-5, and its loader leaves out the last partial batch of an
epoch; ours does neither (docs/concepts.md, "Local training").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.vision_tower import VisionTower
from fedprompt.config.fields import option
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import Method, RoundInfo, Task, Tensors
from fedprompt.methods.parts.deep_prompts import DeepText, coupled, layers_within
from fedprompt.methods.parts.linear import linear_start
from fedprompt.methods.parts.losses import cosine_logits
from fedprompt.methods.parts.prompts import PromptConfig


@dataclass(frozen=True)
class MaPLeConfig(PromptConfig):
    """Defaults: the authors' M = 2 tokens in J = 9 layers, from "a photo of a"."""

    sharing: Literal["text", "factors", "materialised"] = option("text", "what is averaged")
    context_tokens: int = option(2, "tokens M of every prompt", ge=1)
    depth: int = option(9, "layers J with prompts, the first counts; at most the tower's", ge=1)
    context_init: str | None = option("a photo of a", "start words; those after M tokens stay")


class MaPLe(Method):
    """`text` (J, M, d); `weight` (J, w, d) and `bias` (J, w) of F; `visual` (J, M, w)."""

    name = "maple"
    source = "Khattak et al., CVPR 2023"
    Config = MaPLeConfig
    multi_label = True
    needs = frozenset({"features", "pixels"})
    images_at_once = 256

    def __init__(self, config: MaPLeConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.sharing = config.sharing
        if self.sharing == "materialised":
            # V is trained through P and F only; an optimiser must not move it as well.
            self.frozen = frozenset({"shared.visual", "private.anchor", "private.training"})
        self.vision = VisionTower(clip)
        depth = layers_within("image", config.depth, self.vision.layers)
        self.text = DeepText(
            clip, task, config.context_tokens, depth, config.context_init, config.init_std
        )

    def init_shared(self, seed: int) -> Tensors:
        """`text`; with `factors` also `weight` and `bias`, with `materialised` also `visual`."""
        text = {"text": self.text.start(seed, "init", "shared")}
        if self.sharing == "text":
            return text
        factors = self._start_factors(seed)
        if self.sharing == "factors":
            return text | factors
        # V_j = F_j(P_j) of the common start, so that every client's first anchor equals V.
        return text | {"visual": visual_prompts(text, factors)}

    def init_private(self, seed: int, client: int) -> Tensors:
        """`weight`, `bias`: the same draw for all clients; nothing with `factors`.

        With `materialised` also `anchor`, A_k, and `training`, 1 within a round and 0 outside.
        """
        if self.sharing == "factors":
            return {}
        factors = self._start_factors(seed)
        if self.sharing == "text":
            return factors
        tokens = self.config.context_tokens
        anchor = torch.zeros(self.text.depth, tokens, self.vision.width)
        return factors | {"anchor": anchor, "training": torch.zeros(1)}

    def start_round(
        self, shared: Tensors, private: Tensors, round_info: RoundInfo
    ) -> tuple[Tensors, Tensors]:
        """`materialised`: store A_k, so that training starts from the received visual prompts."""
        if self.sharing != "materialised":
            return shared, private
        training = torch.ones_like(private["training"])
        # A_k = F_k(P) at the received P and the client's own F.
        return shared, private | {"anchor": visual_prompts(shared, private), "training": training}

    def end_round(
        self, shared: Tensors, private: Tensors, round_info: RoundInfo
    ) -> tuple[Tensors, Tensors]:
        """`materialised`: upload the visual prompts at the end of training."""
        if self.sharing != "materialised":
            return shared, private
        # Computed while `training` is still 1, so that the change within the round is included.
        visual = self._materialised(shared, private)
        training = torch.zeros_like(private["training"])
        return shared | {"visual": visual}, private | {"training": training}

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """`classes` (K, C, D) and, where there are any, `visual` (K, J, M, w)."""
        return {"classes": self.text.classes(shared["text"])} | self.visual(shared, private)

    def visual(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """The visual prompts (K, J, M, w) as `visual`; nothing if the model has none."""
        if self.sharing == "factors":
            return {"visual": visual_prompts(shared, shared)}
        if self.sharing == "materialised":
            return {"visual": self._materialised(shared, private)}
        return {} if private is None else {"visual": visual_prompts(shared, private)}

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """Cosine logits (K, B, C) of the prompted image and text features."""
        return cosine_logits(self.clip, self.images(encoded, inputs), encoded["classes"])

    def images(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """L2-normalised image features (K, B, D), prompted if there are visual prompts."""
        if "visual" not in encoded:
            return inputs.features
        assert inputs.pixels is not None
        return self.vision.features(inputs.pixels, encoded["visual"])

    def class_embeddings(self, encoded: Tensors) -> Tensor | None:
        """None if prompts change the image features."""
        return None if "visual" in encoded else super().class_embeddings(encoded)

    def _start_factors(self, seed: int) -> Tensors:
        """F of all layers: one draw for the first, and one that all deeper layers start from.

        The authors' code copies one linear layer for the deeper ones.
        """
        inputs, outputs, key = self.clip.text.width, self.vision.width, ("init", "projection")
        layers = [linear_start("F_0", outputs, inputs, seed, *key)]
        layers += [linear_start("F_deep", outputs, inputs, seed, *key)] * (self.text.depth - 1)
        weights, biases = zip(*(layer.values() for layer in layers), strict=True)
        return {"weight": torch.stack(weights), "bias": torch.stack(biases)}

    def _materialised(self, shared: Tensors, private: Tensors | None) -> Tensor:
        """V outside a round, V + F_k(P) - A_k within one: (K, J, M, w)."""
        if private is None:
            return shared["visual"]
        moved = visual_prompts(shared, private) - private["anchor"]
        # `training` is a tensor of 0 or 1 rather than a flag of the method, which must stay pure.
        return shared["visual"] + private["training"][..., None, None] * moved


def visual_prompts(text: Tensors, factors: Tensors) -> Tensor:
    """F_j(P_j) for all layers: (..., J, M, w)."""
    return coupled(text["text"], factors["weight"], factors["bias"])
