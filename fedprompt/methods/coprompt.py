"""CoPrompt: MaPLe's prompts with adapters, kept consistent with the frozen CLIP.

Source: Consistency-guided Prompt Learning for Vision-Language Models (Roy, Etemad, ICLR 2024, arXiv
2306.01195). With f a prompted feature of either tower and A its adapter, D -> D/4 -> D without
biases, ReLU after both layers:

    f' = m A(f) + (1 - m) f,    m = 0.1 for images, 0.2 for text
    L  = CE + lambda [ mean over classes (1 - cos(t'_c, t0_c)) + mean over images (1 - cos(v'(x1),
         v0(x2))) ]

t0_c is the frozen feature of a sentence about class c. In each step the index of the sentence is
drawn anew, the same for all classes. x1, x2 are two augmented views of an image; v0 is the frozen
CLIP. Checked against the authors' `trainers/coprompt.py` (a2a6c12).

`sharing` is MaPLe's option, with `factors` as default: the prompts and their projections are
averaged. `adapters: private` stay with the client, and the global model has none, which is m = 0.
Upload on ViT-B/16: 4,752,384 numbers, 5,014,528 with `adapters: shared`. Sentences come from
`data.descriptions`, which all clients know; without them the templates stand in.

How we differ: views are those of `data.views` (the image and random crops, not RandAugment), and v0
of all of them is in the feature cache, so that no frozen tower runs in training. With one view, x2
is x1. The code's first epoch has the rate 1e-5, and its loader leaves out the last partial batch of
an epoch; ours does neither (docs/concepts.md, "Local training").

The paper tunes lambda for each data set: 8 for ImageNet, Flowers102, SUN397 and DTD; 4 for
Caltech101 and Cars; 2 for Aircraft and UCF101; 0.5 for Food101; 0.1 for Pets and EuroSAT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.fields import option
from fedprompt.config.search import Range, log_range
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import Batch, Task, Tensors
from fedprompt.methods.maple import MaPLe, MaPLeConfig
from fedprompt.methods.parts.adapters import bottleneck, bottleneck_start
from fedprompt.methods.parts.losses import cosine_logits, cross_entropy, masked_mean
from fedprompt.methods.parts.sentences import sentence_features

ADAPTERS = ("image_adapter", "text_adapter")


@dataclass(frozen=True)
class CoPromptConfig(MaPLeConfig):
    """Defaults: the larger of the paper's settings per data set; the code's file has M 2, J 9."""

    sharing: Literal["text", "factors", "materialised"] = option("factors", "what is averaged")
    adapters: Literal["private", "shared"] = option("private", "whether adapters are averaged too")
    context_tokens: int = option(4, "tokens M of every prompt", ge=1)
    depth: int = option(12, "layers J with prompts, the first counts; at most the tower's", ge=1)
    reduction: int = option(4, "an adapter's hidden width is the embedding's divided by this", ge=1)
    image_ratio: float = option(
        0.1, "m, weight of the adapted image feature", ge=0, le=1, search=Range(0.0, 0.5)
    )
    text_ratio: float = option(
        0.2, "m, weight of the adapted class feature", ge=0, le=1, search=Range(0.0, 0.5)
    )
    # 1 is the code's own value; the paper's values per data set are in the module's docstring.
    consistency_weight: float = option(
        1.0, "weight of the consistency with the frozen CLIP (lambda)",
        ge=0, search=log_range(0.1, 8),
    )  # fmt: skip


class CoPrompt(MaPLe):
    """MaPLe's tensors; `image_adapter` and `text_adapter`, `.down.weight` and `.up.weight` each."""

    name = "coprompt"
    source = "Roy & Etemad, ICLR 2024"
    Config = CoPromptConfig
    needs_to_train = frozenset({"second_view"})
    reads_descriptions = True

    def __init__(self, config: CoPromptConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.cfg = config
        self.sentences_NCD = sentence_features(clip, task, self.name)

    def init_shared(self, seed: int) -> Tensors:
        """MaPLe's, with `adapters: shared` also the adapters."""
        adapters = self._adapters(seed) if self.cfg.adapters == "shared" else {}
        return super().init_shared(seed) | adapters

    def init_private(self, seed: int, client: int) -> Tensors:
        """MaPLe's, with `adapters: private` also the adapters: the same draw for all clients."""
        adapters = self._adapters(seed) if self.cfg.adapters == "private" else {}
        return super().init_private(seed, client) | adapters

    def _adapters(self, seed: int) -> Tensors:
        width, reduction = self.clip.embed_dim, self.cfg.reduction
        start: Tensors = {}
        for name in ADAPTERS:
            start |= bottleneck_start(width, reduction, seed, "init", name, name=name)
        return start

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """`classes` (K, C, D), `visual` if there are visual prompts, and the image adapter."""
        tensors = shared | (private or {})
        classes_KCD = self.text.classes(shared["text"])
        # Without the tensors it is the global model, whose adapters are private.
        if "text_adapter.down.weight" in tensors:
            classes_KCD = _adapted(classes_KCD, tensors, "text_adapter", self.cfg.text_ratio)
        adapter = {n: t for n, t in tensors.items() if n.startswith("image_adapter.")}
        return {"classes": classes_KCD} | self.visual(shared, private) | adapter

    def images(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """L2-normalised image features (K, B, D) behind the adapter, if there is one."""
        images_KBD = super().images(encoded, inputs)
        if "image_adapter.down.weight" not in encoded:
            return images_KBD
        return _adapted(images_KBD, encoded, "image_adapter", self.cfg.image_ratio)

    def class_embeddings(self, encoded: Tensors) -> Tensor | None:
        """None if prompts or an adapter change the image features."""
        adapted = "image_adapter.down.weight" in encoded
        return None if adapted else super().class_embeddings(encoded)

    def loss_terms(
        self, shared: Tensors, private: Tensors, encoded: Tensors, batch: Batch
    ) -> dict[str, Tensor]:
        """Cross-entropy `ce`, and the weighted terms `text` and `image`."""
        classes_KCD, images_KBD = encoded["classes"], self.images(encoded, batch.inputs)
        second_KBD = batch.inputs.features if batch.second_KBD is None else batch.second_KBD
        count = len(self.sentences_NCD)
        # A draw below 1 may round up to `count` in the product.
        index_K = (batch.uniform((), "sentence") * count).long().clamp(max=count - 1)
        # All features have length 1, so that their products are cosines.
        text_KC = (classes_KCD * self.sentences_NCD[index_K]).sum(-1)
        image_KB = (images_KBD * second_KBD).sum(-1)
        weight = self.cfg.consistency_weight
        return {
            "ce": cross_entropy(cosine_logits(self.clip, images_KBD, classes_KCD), batch),
            "text": weight * (1 - text_KC.mean(-1)),
            "image": weight * masked_mean(1 - image_KB, batch.mask_KB),
        }


def _adapted(features: Tensor, tensors: Tensors, name: str, ratio: float) -> Tensor:
    """f' (K, ..., D), L2-normalised.

    The public code adapts features before they are normalised, which gives the same direction
    (`bottleneck`).
    """
    mixed = ratio * bottleneck(features, tensors, name) + (1 - ratio) * features
    return F.normalize(mixed, dim=-1)
