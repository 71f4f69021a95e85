"""Pre-Forgettable: one visual token per class; a class is forgotten by leaving its token out.

Source: Pre-Forgettable Models: Prompt Learning as a Native Mechanism for Unlearning (Hendrix et
al., ACM MM 2025, arXiv 2509.15230; code perceivelab/PreForgettableModels). Token v_c stands beside
the patches of an image. In every step an image of class y is seen with two sets of tokens, and u is
the uniform distribution over all C classes:

    mixed: v_y and s tokens of other classes        L = CE(y, p_mixed) + KL(u || p_wrong)
    wrong: s' tokens of other classes, without v_y

s and s' are drawn from 0 .. C - 1 once per step, the other classes for each image. With s' = 0 no
token is used, so that KL is a constant. At test time all tokens are used, and unlearning a class
leaves its token out (`without_classes`): nothing is trained, and no image is needed. Tokens start
from N(0, 1). Checked against the code's `preforgettable/models.py`, `train.py` and `utils.py`.

A federation may forget a client in the same way where it alone holds some classes. The tokens are
averaged over the clients that have images of their class (`strategies/per_class.py`); for this
purpose a client uploads its LABEL HISTOGRAM as `class_shares` (`parts/class_shares.py`). A token
then depends on images of its own class, and on those of others only because clients start a round
from all tokens. Upload: C (w + 1) numbers.

How we differ: the paper adapts a ViT without text by LoRA and learns a linear head. Here the tower
stays frozen, the head is the text of the classes, and neither LoRA nor a head is learned. So a
forgotten class still has the accuracy that CLIP has without any prompt; the protocol `unlearning`
shows it beside the others. All clients draw the same s and s' in a step. Tokens stand behind the
patches and pass through `ln_pre`; without positional embeddings their order does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.vision_tower import VisionTower
from fedprompt.config.fields import option
from fedprompt.config.search import log_range
from fedprompt.data.features.inputs import Inputs
from fedprompt.errors import UserError
from fedprompt.methods.base import Batch, Method, MethodConfig, RoundInfo, Task, Tensors
from fedprompt.methods.parts.class_shares import SHARES, class_shares
from fedprompt.methods.parts.labels import one_hot, rows_of
from fedprompt.methods.parts.losses import cosine_logits, cross_entropy, masked_mean
from fedprompt.rng import normal, uniform


@dataclass(frozen=True)
class PreForgettableConfig(MethodConfig):
    """Defaults: the code's start and weight."""

    default_strategy = MappingProxyType({"name": "per_class"})

    init_std: float = option(1.0, "standard deviation of the tokens' start", gt=0)
    wrong_weight: float = option(
        1.0, "weight of the KL divergence without the own token", ge=0, search=log_range(0.05, 5)
    )
    template: str | None = option("a photo of a {}.", "text of a class; null = the data set's own")

    def check(self) -> None:
        """Refuse a text without a place for the class name."""
        if self.template is not None and self.template.count("{}") != 1:
            raise UserError(f"template is '{self.template}'; it must have one {{}} for the class.")


class PreForgettable(Method):
    """`tokens` (C, w) are shared; nothing is private, and `class_shares` reveals the labels."""

    name = "pre_forgettable"
    source = "Hendrix et al., ACM MM 2025"
    Config = PreForgettableConfig
    needs = frozenset({"features", "pixels"})
    frozen = frozenset({f"shared.{SHARES}"})
    no_transfer_reason = "each token belongs to the class that it was trained for"
    images_at_once = 256

    def __init__(self, config: PreForgettableConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.cfg = config
        self.vision = VisionTower(clip)
        templates = (config.template,) if config.template else task.templates
        self.classes_1CD = clip.zero_shot_classifier(task.class_names, templates)[None]

    def init_shared(self, seed: int) -> Tensors:
        """`tokens` (C, w) and `class_shares` (C,), zeros until a client has trained."""
        classes = len(self.task.class_names)
        shape = (classes, self.vision.width)
        return {
            "tokens": normal(shape, self.cfg.init_std, seed, "init", "shared"),
            SHARES: torch.zeros(classes),
        }

    def without_classes(self, shared: Tensors, classes: Sequence[int]) -> Tensors:
        """Leave the tokens of these classes out; see `Method.without_classes`."""
        kept = [c for c in range(len(self.task.class_names)) if c not in classes]
        return {**shared, "tokens": shared["tokens"][kept]}

    def end_round(
        self, shared: Tensors, private: Tensors, round_info: RoundInfo
    ) -> tuple[Tensors, Tensors]:
        """Add each class's share of the client's training images."""
        return {**shared, SHARES: class_shares(round_info)}, private

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """The fixed `classes` (1, C, D) and all `tokens` (K, C, w)."""
        return {"classes": self.classes_1CD, "tokens": shared["tokens"]}

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """Cosine logits (K, B, C) of images seen with all tokens."""
        assert inputs.pixels is not None
        if not encoded["tokens"].shape[1]:
            return self._scored(inputs.features)
        return self._scored(self.vision.features(inputs.pixels, encoded["tokens"][:, None]))

    def loss_terms(
        self, shared: Tensors, private: Tensors, encoded: Tensors, batch: Batch
    ) -> dict[str, Tensor]:
        """Cross-entropy `ce` with the own token, and `wrong`, the divergence without it."""
        tokens_KCw, weight = encoded["tokens"], self.cfg.wrong_weight
        draws_KB2C = batch.uniform((batch.labels_KB.shape[1], 2, tokens_KCw.shape[1]), "subsets")
        mixed_KBC = self._seen_with(tokens_KCw, batch, draws_KB2C[:, :, 0], own=True)
        terms = {"ce": cross_entropy(mixed_KBC, batch)}
        if weight:
            wrong_KBC = self._seen_with(tokens_KCw, batch, draws_KB2C[:, :, 1], own=False)
            # KL(u || p) = -log C - mean log p.
            log_p_KB = wrong_KBC.log_softmax(-1).mean(-1)
            kl_KB = -math.log(wrong_KBC.shape[-1]) - log_p_KB
            terms["wrong"] = weight * masked_mean(kl_KB, batch.mask_KB)
        return terms

    def _seen_with(
        self, tokens_KCw: Tensor, batch: Batch, draws_KBC: Tensor, *, own: bool
    ) -> Tensor:
        """Logits (K, B, C) of each image under some tokens.

        Args:
            tokens_KCw: all tokens.
            batch: the step.
            draws_KBC: the other classes with the lowest draws are taken.
            own: whether the token of the image's class is taken as well.
        """
        classes, info = tokens_KCw.shape[1], batch.round_info
        # One size for all clients, since their images run through the tower together.
        purpose = "subset size", "mixed" if own else "wrong"
        draw = uniform((1,), info.seed, *purpose, info.server_round, batch.step)
        size = int(classes * draw.item())
        if not own and not size:
            return self._scored(batch.inputs.features)
        assert batch.inputs.pixels is not None
        # The own class comes first or last, whatever the order of the others.
        place = -1.0 if own else 2.0
        order_KBC = draws_KBC.masked_fill(one_hot(batch.labels_KB, tokens_KCw) > 0, place)
        chosen_KBM = order_KBC.argsort(dim=-1, stable=True)[..., : size + own]
        # The tower takes one set of tokens per client, so every image is a client of its own.
        picked_KBMw = rows_of(chosen_KBM.flatten(1), tokens_KCw).unflatten(1, chosen_KBM.shape[1:])
        clients = picked_KBMw.shape[0]
        pixels = batch.inputs.pixels.expand(clients, -1, -1, -1, -1).flatten(0, 1)[:, None]
        features = self.vision.features(pixels, picked_KBMw.flatten(0, 1)[:, None])
        return self._scored(features.view(clients, -1, features.shape[-1]))

    def _scored(self, features_KBD: Tensor) -> Tensor:
        return cosine_logits(self.clip, features_KBD, self.classes_1CD)

    def class_embeddings(self, encoded: Tensors) -> Tensor | None:
        """None: tokens change the image features."""
        return None
