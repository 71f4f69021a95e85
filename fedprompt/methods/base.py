"""What a prompt-learning method is: what it shares, what it keeps, its logits and its loss.

Shape suffixes: K clients (leading axis of every tensor in training), B images of a batch, C
classes, M context tokens, d text width, D joint embedding. Features and class features are
L2-normalised before they meet; `clip.logit_scale` multiplies their cosine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.clip import FrozenCLIP
from fedprompt.rng import normal
from fedprompt.text_tower import TextTower, context_init

Tensors = dict[str, Tensor]
"""Named tensors: shared or private prompts, in one container each."""


@dataclass(frozen=True)
class Task:
    """What a client is asked to tell apart: class names in label order and zero-shot templates."""

    class_names: tuple[str, ...]
    templates: tuple[str, ...] = ("a photo of a {}.",)


@dataclass(frozen=True)
class Batch:
    """One step's images of K clients; `mask_KB` is false where a client's batch is padded."""

    features_KBD: Tensor
    labels_KB: Tensor
    mask_KB: Tensor


class Method(ABC):
    """One paper, one file. Subclasses are found by module; nothing else knows their names.

    `encode` turns prompts into everything that does not depend on images, once per step and once
    per evaluation; `logits` and `terms` use it.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    """Authors, venue and year, for the table of methods."""
    Config: ClassVar[type[Any]]
    needs: ClassVar[frozenset[str]] = frozenset({"features"})
    """What a client must supply: `features` (cached), `patches` or `images`."""
    trainable: ClassVar[bool] = True
    transfers_to_new_classes: ClassVar[bool] = True
    """Whether the tensors mean something for other class names too; false where a tensor belongs to
    a class (class-specific contexts, caches of class features)."""

    def __init__(self, config: Any, clip: FrozenCLIP, task: Task) -> None:
        self.config = config
        self.clip = clip
        self.task = task

    @abstractmethod
    def init_shared(self, seed: int) -> Tensors:
        """Starting values of what the server aggregates, without a client axis."""

    @abstractmethod
    def init_private(self, seed: int, client: int) -> Tensors:
        """Starting values of what client `client` keeps; the same names and shapes for all."""

    @abstractmethod
    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """Image-independent state of K clients; `private=None` asks for the global model (K=1).

        `shared` has a client axis of 1 where all clients hold the same values, as in evaluation.
        """

    @abstractmethod
    def logits(self, encoded: Tensors, features_KBD: Tensor) -> Tensor:
        """Class logits (K, B, C) of L2-normalised image features; a client axis of 1 broadcasts."""

    def terms(
        self, shared: Tensors, private: Tensors, encoded: Tensors, batch: Batch
    ) -> dict[str, Tensor]:
        """Weighted loss terms by name, each (K,); their sum is minimised. Default: CE alone."""
        del shared, private
        logits_KBC = self.logits(encoded, batch.features_KBD)
        return {"ce": cross_entropy(logits_KBC, batch)}

    def class_embeddings(self, encoded: Tensors) -> Tensor | None:
        """Embeddings (C, D) whose products with image features are the logits, or None."""
        classes = encoded.get("classes")
        return None if classes is None else classes[0]

    @property
    def has_global(self) -> bool:
        """Whether a model without private tensors exists (shared prompts, or none at all)."""
        return bool(self.init_shared(0)) or not self.trainable

    def uploaded_numbers(self) -> int:
        """How many numbers a client sends per round."""
        return sum(t.numel() for t in self.init_shared(0).values())


def cross_entropy(logits_KBC: Tensor, batch: Batch) -> Tensor:
    """Mean cross-entropy of each client over its real (unmasked) images: (K,)."""
    loss_KB = F.cross_entropy(logits_KBC.flatten(0, 1), batch.labels_KB.flatten(), reduction="none")
    return masked_mean(loss_KB.view_as(batch.mask_KB), batch.mask_KB)


def masked_mean(values_KB: Tensor, mask_KB: Tensor) -> Tensor:
    """Mean over the images where the mask is true: (K,)."""
    weight_KB = mask_KB.to(values_KB.dtype)
    return (values_KB * weight_KB).sum(-1) / weight_KB.sum(-1)


def cosine_logits(clip: FrozenCLIP, features_KBD: Tensor, classes_KCD: Tensor) -> Tensor:
    """CLIP's logits: exp(logit_scale) times the products with class features, (K, B, C)."""
    return clip.logit_scale * (features_KBD @ classes_KCD.transpose(-1, -2))


class PromptSource:
    """A text tower and the starting values of the contexts that it takes."""

    def __init__(
        self,
        clip: FrozenCLIP,
        task: Task,
        tokens: int,
        *,
        position: Any = "end",
        init_text: str | None = None,
        init_std: float = 0.02,
    ) -> None:
        self.tower = TextTower(clip, task.class_names, tokens, position=position)
        self.clip, self.tokens = clip, tokens
        self.init_text, self.init_std = init_text, init_std

    def start(self, seed: int, *purpose: str | int) -> Tensor:
        """A starting context (M, d): `init_text`'s embeddings, or N(0, init_std^2)."""
        draw = normal((self.tokens, self.clip.text.width), self.init_std, seed, *purpose)
        return context_init(self.clip, self.init_text, self.tokens, draw)

    def classes(self, context: Tensor) -> Tensor:
        """L2-normalised class features (..., C, D) of contexts (..., M, d)."""
        return F.normalize(self.tower(context), dim=-1)


def stack(items: list[Tensors], device: torch.device | str = "cpu") -> Tensors:
    """Named tensors of K clients with a leading client axis, on `device`."""
    return {k: torch.stack([item[k] for item in items]).to(device) for k in items[0]}
