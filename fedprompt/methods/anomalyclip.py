"""AnomalyCLIP as a novelty head: two prompts without class names tell known images from others.

Source: AnomalyCLIP: Object-agnostic Prompt Learning for Zero-shot Anomaly Detection (Zhou, Pang,
Tian, He, Chen, ICLR 2024, arXiv 2310.18961; code zqhang/AnomalyCLIP). Two prompts that name no
class are learned, `[V_1]...[V_12][object].` for what is normal and
`[W_1]...[W_12][damaged][object].` for what is not, with four deep tokens at each of the layers 1 to
8 for both. With n and a their features,

    p(normal, abnormal | v) = softmax(v . n / tau, v . a / tau),    tau = 0.07

The port is ours [I]: there are no anomalies with labels or masks in our data. Normal are a client's
images (`ce`); abnormal are regions of them that do not show their class (`regions`): as in LoCoOp,
those for which the label is not among the K best of CLIP's own class features. Both prompts are
shared, 28,672 numbers on ViT-B/16 (43,008 on ViT-L/14, as in the paper); nothing is private.

Classes are predicted by zero-shot CLIP, whose accuracy training does not change. What is learned is
the score p(abnormal | v), which the `ood` protocol reports as "novelty head" beside MCM.

How we differ: the pixel losses (focal and dice, on similarity maps of several layers) need masks
and are left out. The paper's image tower attends by V-V attention in its last 20 layers; ours is
CLIP's, and regions have the last layer's values (`local` features). The code also creates
projections of the deep prompts that it never uses. Text takes the path of whole sequences, because
the two prompts share no beginning; they are two short ones, whatever the number of classes.

Suffixes: K clients, B images, P regions, C classes, D joint embedding, M tokens, d text width, J
layers with deep tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.text_tower import TextTower
from fedprompt.config.fields import option
from fedprompt.config.search import Range, log_range
from fedprompt.data.features.inputs import Inputs
from fedprompt.errors import UserError
from fedprompt.methods.base import Batch, Method, MethodConfig, Task, Tensors
from fedprompt.methods.parts.deep_prompts import layers_within
from fedprompt.methods.parts.losses import cosine_logits, masked_mean
from fedprompt.methods.parts.regions import best_classes, without_label
from fedprompt.rng import normal

WORDS = ("object", "damaged object")
"""What follows the context of the normal and of the abnormal prompt, as in the code."""


@dataclass(frozen=True)
class AnomalyCLIPConfig(MethodConfig):
    """Defaults: the code's; its optimiser is Adam at 0.001 with betas 0.5 and 0.999."""

    context_tokens: int = option(12, "context tokens M of each prompt", ge=1)
    deep_tokens: int = option(4, "tokens of each deep text prompt", ge=1)
    depth: int = option(9, "layers with learned text tokens, the first included", ge=1)
    init_std: float = option(0.02, "standard deviation of the random start", gt=0)
    temperature: float = option(0.07, "softmax temperature tau of the two prompts", gt=0)
    region_weight: float = option(
        1.0, "weight of the regions without the class", ge=0, search=log_range(0.1, 10)
    )
    top_share: float = option(
        0.2,
        "K as a share of the classes: a region shows the label if it is among its K best",
        gt=0, lt=1, search=Range(0.05, 0.5),
    )  # fmt: skip

    def check(self) -> None:
        """Refuse deep prompts that are longer than the context whose place they take."""
        if self.deep_tokens > self.context_tokens:
            raise UserError(
                f"'deep_tokens' is {self.deep_tokens}, but they replace tokens of a context of "
                f"{self.context_tokens}; give at most that many."
            )


class AnomalyCLIP(Method):
    """`ctx` (2, M, d) and `deep` (J, m, d) are shared; nothing is private."""

    name = "anomalyclip"
    source = "Zhou et al., ICLR 2024"
    Config = AnomalyCLIPConfig
    needs_to_train = frozenset({"local"})

    def __init__(self, config: AnomalyCLIPConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.cfg = config
        self.layers = layers_within("text", config.depth, len(clip.text.blocks)) - 1
        self.tower = TextTower(clip, WORDS, config.context_tokens, class_specific=True)
        self.classes_CD = clip.zero_shot_classifier(task.class_names, task.templates)
        self.top_k = best_classes(config.top_share, len(task.class_names))

    def init_shared(self, seed: int) -> Tensors:
        """`ctx` (2, M, d), normal first, and `deep` (J, m, d) unless the depth is 1."""
        width, std = self.clip.text.width, self.cfg.init_std
        start = {
            "ctx": normal((2, self.cfg.context_tokens, width), std, seed, "init", "shared"),
        }
        if self.layers:
            shape = (self.layers, self.cfg.deep_tokens, width)
            start["deep"] = normal(shape, std, seed, "init", "shared", "deep")
        return start

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """`pair` (K, 2, D), and CLIP's own `classes` (K, C, D)."""
        pair_K2D = F.normalize(self.tower(shared["ctx"], shared.get("deep")), dim=-1)
        return {"pair": pair_K2D, "classes": self.classes_CD.expand(len(pair_K2D), -1, -1)}

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """Zero-shot CLIP's logits (K, B, C)."""
        return cosine_logits(self.clip, inputs.features, encoded["classes"])

    def novelty(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """p(abnormal | v), (K, B)."""
        return self._log_pair(inputs.features, encoded["pair"])[..., 1].exp()

    def loss_terms(
        self, shared: Tensors, private: Tensors, encoded: Tensors, batch: Batch
    ) -> dict[str, Tensor]:
        """`ce`: images are normal; `regions`: regions without the class are not."""
        images_KB2 = self._log_pair(batch.inputs.features, encoded["pair"])
        local_KBPD = batch.inputs.local
        assert local_KBPD is not None
        chosen_KBP = self._without_class(local_KBPD, batch)
        flat_KR2 = self._log_pair(local_KBPD.flatten(1, 2), encoded["pair"])
        abnormal_KBP = flat_KR2[..., 1].unflatten(1, tuple(local_KBPD.shape[1:3]))
        # The sum is 0 if no region is chosen, whatever it is then divided by.
        regions_K = chosen_KBP.sum((-2, -1)).clamp(min=1)
        mean_K = (abnormal_KBP * chosen_KBP).sum((-2, -1)) / regions_K
        return {
            "ce": masked_mean(-images_KB2[..., 0], batch.mask_KB),
            "regions": -self.cfg.region_weight * mean_K,
        }

    def _log_pair(self, features_KND: Tensor, pair_K2D: Tensor) -> Tensor:
        """Logarithms of p(normal) and p(abnormal), (K, N, 2)."""
        return (features_KND @ pair_K2D.transpose(1, 2) / self.cfg.temperature).log_softmax(-1)

    @torch.no_grad()
    def _without_class(self, local_KBPD: Tensor, batch: Batch) -> Tensor:
        """1 for regions for which the label is not among the K best classes, (K, B, P)."""
        return without_label(local_KBPD @ self.classes_CD.T, batch, self.top_k)
