"""LoRA: low-rank additions to CLIP's own weights instead of prompts, with four ways to share them.

Sources: LoRA (Hu et al., ICLR 2022, arXiv 2106.09685); for CLIP, CLIP-LoRA (Zanella and Ben Ayed,
CVPR Workshops 2024, arXiv 2405.18541); in federations FLoRA, in CLIP's text encoder (Nguyen et al.,
arXiv 2404.15182), and those below. In each adapted layer, with frozen W_0,

    W = W_0 + (lora_alpha / r) B A,     A (r, inputs) ~ U(-1/sqrt(inputs), 1/sqrt(inputs)),  B = 0

so that the start is zero-shot CLIP with the text `template`. Cosine logits, cross-entropy.

`sharing` says what leaves the client:

- `both`: A and B are averaged, as in FLoRA. THE MEAN OF FACTORS IS NOT THE FACTOR OF THE MEAN: the
  global addition is mean(B) mean(A) instead of mean(B A), which mixes B of one client with A of
  another. `strategy=product_mean` averages the products and factorises them again.
- `ffa`: A stays at its random start, B alone is trained and averaged (FFA-LoRA; Sun et al., ICLR
  2024, arXiv 2403.12313). With one A for all, mean(B) A is the exact mean. A has one seed for all
  runs and is never sent.
- `fedsa`: A is averaged, B stays (FedSA-LoRA; Guo et al., ICLR 2025, arXiv 2410.01463). Both are
  trained. There is no global model.
- `dual`: A and B of rank r are averaged, and a private adapter of rank `private_r` is added to them
  (dual adapters; Nguyen et al., arXiv 2503.07552, RECONSTRUCTED FROM THE ABSTRACT: the paper's
  adapters also distil into each other, and its local one is pruned; ours are trained as a sum).

Options have peft's names where it has them. RECONSTRUCTED: no public code of the federated papers
was run, and the four sharings follow their abstracts; rank, scale and products are read from the
code of CLIP-LoRA.

How we differ: a layer is chosen by its place from above (`text_layers`, `image_layers`), because
what lies below the first adapted layer is then computed once (`backbone/lora_text.py`). CLIP-LoRA
trains both towers, its code divides lora_alpha by the root of r (`use_rslora`), and it has a
dropout of 0.25 before A, which is left out.

Shape suffixes: K clients, L adapted layers of a tower, r rank, i inputs and o outputs of a product,
C classes, D joint embedding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.frozen_layer import FrozenLayer
from fedprompt.backbone.lora_image import LoraImages
from fedprompt.backbone.lora_layer import TARGETS, Additions, Pair, grouped, product_shape
from fedprompt.backbone.lora_text import LoraText
from fedprompt.backbone.vision_tower import VisionTower
from fedprompt.config.fields import option
from fedprompt.config.search import Choices, Range, log_range
from fedprompt.data.features.inputs import Inputs
from fedprompt.errors import UserError, did_you_mean
from fedprompt.methods.base import Method, MethodConfig, Task, Tensors
from fedprompt.methods.parts.adapters import check_template, template_classes
from fedprompt.methods.parts.deep_prompts import layers_within
from fedprompt.methods.parts.linear import uniform_start
from fedprompt.methods.parts.losses import cosine_logits


@dataclass(frozen=True)
class LoRAConfig(MethodConfig):
    """Defaults: rank, scale and projections of CLIP-LoRA's code; the text tower alone, as FLoRA."""

    sharing: Literal["both", "ffa", "fedsa", "dual"] = option("both", "which factors are averaged")
    r: int = option(2, "rank of the adapters", ge=1, search=Choices((1, 2, 4, 8)))
    lora_alpha: float = option(
        1.0, "scale of the additions, times the rank", gt=0, search=log_range(0.5, 32)
    )
    use_rslora: bool = option(False, "divide lora_alpha by the root of the rank instead")
    private_r: int = option(8, "sharing=dual: rank of the private adapters", ge=1)
    target_modules: list[str] = option(
        ["q_proj", "k_proj", "v_proj"], "products with additions: those, out_proj, fc1, fc2"
    )
    text_layers: int = option(12, "top layers of the text tower with additions; 0 = none", ge=0)
    image_layers: int = option(0, "top layers of the image tower with additions; 0 = none", ge=0)
    template: str | None = option("a photo of a {}.", "text of a class; null = the data set's own")

    def check(self) -> None:
        """Refuse unknown products, no layers, and a template without a place for the class."""
        for name in self.target_modules:
            if name not in TARGETS:
                raise UserError(
                    f"target_modules: there is no product '{name}'.{did_you_mean(name, TARGETS)}"
                )
        if not self.target_modules or len(set(self.target_modules)) < len(self.target_modules):
            raise UserError("target_modules must name at least one product, and none twice.")
        if not self.text_layers and not self.image_layers:
            raise UserError("text_layers and image_layers are both 0; one of them must be larger.")
        check_template(self.template)

    @property
    def supports_image_noise(self) -> bool:
        """Unless the image tower is adapted, which cached features do not pass through."""
        return not self.image_layers

    @property
    def lr_space(self) -> Range | None:
        """From CLIP-LoRA's 0.0002, for AdamW, to what SGD needs."""
        return log_range(0.0001, 0.5)


class LoRA(Method):
    """`<tower>.<product>.lora_A` (L, r, i) and `.lora_B` (L, o, r), shared or private.

    The names of shared and private adapters are the same; `sharing` decides which exist.
    """

    name = "lora"
    source = "Hu et al., ICLR 2022 (federations reconstructed)"
    Config = LoRAConfig
    multi_label = True

    def __init__(self, config: LoRAConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.cfg = config
        self.has_global = config.sharing != "fedsa"
        templates = task.templates if config.template is None else (config.template,)
        names = [name.replace("_", " ") for name in task.class_names]
        # By tower, the first adapted layer's shapes and the number of adapted layers.
        self.towers: dict[str, tuple[FrozenLayer, int]] = {}
        self.texts: list[LoraText] = []
        if config.text_layers:
            count = layers_within("text", config.text_layers, len(clip.text.blocks))
            self.texts = [LoraText(clip, [t.format(n) for n in names], count) for t in templates]
            self.towers["text"] = (clip.text_layers[0], count)
        else:
            self.classes_1CD = template_classes(
                clip, task.class_names, task.templates, config.template
            )
        if config.image_layers:
            vision = VisionTower(clip)
            count = layers_within("image", config.image_layers, vision.layers)
            self.images = LoraImages(vision, count)
            self.towers["image"] = (clip.image_layers[0], count)
            self.needs = frozenset({"features", "pixels"})
            self.images_at_once = 256
        # Of one seed for all runs, as server and clients need the same A without sending it.
        self.fixed = {
            name: t[None].to(clip.device)
            for name, t in self._start(0, config.r).items()
            if config.sharing == "ffa" and name.endswith("lora_A")
        }

    def _start(self, seed: int, rank: int, *purpose: str) -> Tensors:
        """A and B of all adapted layers, as peft starts them."""
        start: Tensors = {}
        for tower, (layer, count) in self.towers.items():
            for target in self.cfg.target_modules:
                outputs, inputs = product_shape(target, layer)
                name = f"{tower}.{target}"
                start[f"{name}.lora_A"] = uniform_start(
                    (count, rank, inputs), 1 / math.sqrt(inputs), seed, "init", *purpose, name
                )
                start[f"{name}.lora_B"] = torch.zeros(count, outputs, rank)
        return start

    def init_shared(self, seed: int) -> Tensors:
        """The factors that `sharing` averages."""
        factors = {"ffa": "lora_B", "fedsa": "lora_A"}.get(self.cfg.sharing, "")
        start = self._start(seed, self.cfg.r, "shared")
        return {name: t for name, t in start.items() if name.endswith(factors)}

    def init_private(self, seed: int, client: int) -> Tensors:
        """B of `fedsa`, both factors of `dual`; all clients start from the same draw."""
        if self.cfg.sharing == "dual":
            return self._start(seed, self.cfg.private_r, "private")
        if self.cfg.sharing == "fedsa":
            start = self._start(seed, self.cfg.r)
            return {name: t for name, t in start.items() if name.endswith("lora_B")}
        return {}

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """`classes` (K, C, D), and the image tower's joined factors by group."""
        encoded: Tensors = {}
        if self.texts:
            additions = self._additions("text", shared, private)
            per_template = [F.normalize(text(additions), dim=-1) for text in self.texts]
            encoded["classes"] = F.normalize(torch.stack(per_template).mean(0), dim=-1)
        else:
            encoded["classes"] = self.classes_1CD
        if "image" in self.towers:
            for group, (a, b) in self._additions("image", shared, private).items():
                encoded |= {f"{group}.lora_A": a, f"{group}.lora_B": b}
        return encoded

    def _additions(self, tower: str, shared: Tensors, private: Tensors | None) -> Additions:
        own = private or {}
        pairs: dict[str, list[Pair]] = {}
        for target in self.cfg.target_modules:
            a, b = f"{tower}.{target}.lora_A", f"{tower}.{target}.lora_B"
            if self.cfg.sharing == "fedsa":
                factors = [(shared[a], own[b])]
            else:
                factors = [(self.fixed[a] if a in self.fixed else shared[a], shared[b])]
                if self.cfg.sharing == "dual" and own:
                    factors.append((own[a], own[b]))
            pairs[target] = [
                (a_KLri, b_KLor * self._scale(b_KLor.shape[-1])) for a_KLri, b_KLor in factors
            ]
        return grouped(pairs)

    def _scale(self, rank: int) -> float:
        """lora_alpha / r of an adapter with its own rank."""
        divisor = math.sqrt(rank) if self.cfg.use_rslora else rank
        return self.cfg.lora_alpha / divisor

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """Cosine logits (K, B, C)."""
        images_KBD = inputs.features
        if "image" in self.towers:
            assert inputs.pixels is not None
            groups = {n.partition(".")[0] for n in encoded if n.endswith("lora_A")}
            additions = {g: (encoded[f"{g}.lora_A"], encoded[f"{g}.lora_B"]) for g in groups}
            images_KBD = F.normalize(self.images(inputs.pixels, additions), dim=-1)
        return cosine_logits(self.clip, images_KBD, encoded["classes"])

    def class_embeddings(self, encoded: Tensors) -> Tensor | None:
        """(C, D) where the image features are CLIP's own."""
        return None if "image" in self.towers else super().class_embeddings(encoded)
