"""What a prompt-learning method is: what it shares, what it keeps, its logits and its loss.

A method is pure functions on named tensors. Shared and private tensors live in two containers, so
no filter of names decides what leaves a client. A round of local training, with the client axis K
in front of every tensor:

    shared, private = start_round(shared, private, visit)
    per step: encode -> terms (which use logits) -> gradients; the optimiser moves the prompts
    shared, private = end_round(shared, private, visit)      `shared` is uploaded

Shape suffixes: K clients (leading axis of every tensor in training), B images of a batch, C
classes, M context tokens, d text width, D joint embedding. Features and class features are
L2-normalised before they meet; `clip.logit_scale` multiplies their cosine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.data.features.inputs import Inputs
from fedprompt.rng import normal, uniform

Tensors = dict[str, Tensor]
"""Named tensors: shared or private prompts, in one container each."""


@dataclass(frozen=True)
class Task:
    """What a client is asked to tell apart: class names in label order and zero-shot templates."""

    class_names: tuple[str, ...]
    templates: tuple[str, ...] = ("a photo of a {}.",)


@dataclass(frozen=True)
class ClientData:
    """A client's own labelled training images.

    `inputs` has n images, or views x n where each image has several views: view v of image i is row
    v n + i, and training draws one of them per image and epoch.
    """

    client: int
    inputs: Inputs
    labels_N: Tensor
    views: int = 1

    def __len__(self) -> int:
        """Number of images n."""
        return len(self.labels_N)

    def plain(self) -> Inputs:
        """The n images without augmentation."""
        return self.inputs[: len(self)]


@dataclass(frozen=True)
class RoundInfo:
    """What K clients know of a round while they train in it.

    Attributes:
        clients: their ids.
        seed: the run's seed.
        server_round: 1-based round, of `rounds`.
        lr: the round's learning rate, before a tensor's own factor.
        momentum: SGD's; 0 under other optimisers.
        received: shared tensors, and what else the server sent, as they came: (K, ...).
        steps_K: local steps of each client in this round.
        class_counts_KC: training images per class.
    """

    clients: tuple[int, ...]
    seed: int
    server_round: int
    rounds: int
    lr: float
    received: Tensors
    steps_K: Tensor
    class_counts_KC: Tensor
    momentum: float = 0.0

    def normal(self, shape: tuple[int, ...], *purpose: str | int) -> Tensor:
        """Draws (K, *shape) from N(0, 1), keyed by client, round and purpose."""
        key = (*purpose, self.server_round)
        return self._rows([normal(shape, 1.0, self.seed, *key, c) for c in self.clients])

    def uniform(self, shape: tuple[int, ...], *purpose: str | int) -> Tensor:
        """Draws (K, *shape) from U[0, 1), keyed by client, round and purpose."""
        key = (*purpose, self.server_round)
        return self._rows([uniform(shape, self.seed, *key, c) for c in self.clients])

    def first(self, clients: int) -> RoundInfo:
        """The visit of the first `clients` of them alone."""
        return replace(
            self,
            clients=self.clients[:clients],
            received={n: t[:clients] for n, t in self.received.items()},
            steps_K=self.steps_K[:clients],
            class_counts_KC=self.class_counts_KC[:clients],
        )

    def _rows(self, rows: list[Tensor]) -> Tensor:
        return torch.stack(rows).to(self.steps_K.device)


@dataclass(frozen=True)
class Batch:
    """One step's images of K clients; `mask_KB` is false where a client's batch is padded."""

    inputs: Inputs
    labels_KB: Tensor
    mask_KB: Tensor
    round_info: RoundInfo
    step: int
    """0-based step of the round."""

    def normal(self, shape: tuple[int, ...], *purpose: str | int) -> Tensor:
        """As `RoundInfo.normal`, another draw in every step."""
        return self.round_info.normal(shape, *purpose, self.step)

    def uniform(self, shape: tuple[int, ...], *purpose: str | int) -> Tensor:
        """As `RoundInfo.uniform`, another draw in every step."""
        return self.round_info.uniform(shape, *purpose, self.step)


class Method(ABC):
    """One paper, one file. Subclasses are found by module; nothing else knows their names.

    `encode` turns prompts into everything that does not depend on images, once per step and once
    per evaluation; `logits` and `loss_terms` use it. Clients never mix: row k of a result depends
    on row k of the arguments alone. What depends on the config may be set on the instance instead.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    """Authors, venue and year, for the table of methods."""
    Config: ClassVar[type[Any]]
    needs: frozenset[str] = frozenset({"features"})
    """What of an image is needed: `features` always, `patches` and `pixels` where named."""
    strategy: ClassVar[Mapping[str, Any]] = MappingProxyType({"name": "fedavg"})
    """The paper's server rule, which `strategy: auto` stands for."""
    works_with: ClassVar[frozenset[str] | None] = None
    """Names of the only server rules that give it what it needs; None = any."""
    frozen: frozenset[str] = frozenset()
    """Tensors that no optimiser moves, e.g. `private.keys`, `shared.class_counts`."""
    lr_scale: Mapping[str, float] = MappingProxyType({})
    """Factors of the learning rate, e.g. `private.gate: 5.0`; 1 where nothing is said."""
    trainable: bool = True
    transfers_to_new_classes: bool = True
    """Whether the tensors mean something for other class names too; false where a tensor belongs to
    a class (class-specific contexts, caches of class features)."""
    no_transfer_reason: str = "its tensors belong to the classes that it was trained on"
    """Why not, where they do not."""
    images_at_once: int = 4096
    """Images whose logits are computed at once in evaluation."""

    def __init__(self, config: Any, clip: FrozenCLIP, task: Task) -> None:
        self.config = config
        self.clip = clip
        self.task = task

    @classmethod
    def server_rule(cls, config: Any) -> Mapping[str, Any]:
        """What `strategy: auto` stands for under this config."""
        return cls.strategy

    @classmethod
    def possible_rules(cls, config: Any) -> frozenset[str] | None:
        """`works_with` under this config."""
        return cls.works_with

    @abstractmethod
    def init_shared(self, seed: int) -> Tensors:
        """Starting values of what the server aggregates, without a client axis."""

    @abstractmethod
    def init_private(self, seed: int, client: int) -> Tensors:
        """Starting values of what client `client` keeps; the same names and shapes for all."""

    def init_extras(self, seed: int) -> Tensors:
        """What the server sends to a client besides the shared tensors, before it has anything.

        On a client these stand beside the shared tensors, under names of their own; they are
        neither trained nor uploaded, and the global model goes without them.
        """
        return {}

    def init_private_from_data(self, private: Tensors, data: ClientData, seed: int) -> Tensors:
        """`init_private`'s tensors, completed from the client's own training images.

        Called when a client is first met; shapes stay as they are.
        """
        return private

    def start_round(
        self, shared: Tensors, private: Tensors, round_info: RoundInfo
    ) -> tuple[Tensors, Tensors]:
        """Tensors (K, ...) to train from, made of those received and those kept."""
        return shared, private

    def end_round(
        self, shared: Tensors, private: Tensors, round_info: RoundInfo
    ) -> tuple[Tensors, Tensors]:
        """Tensors (K, ...) to upload and to keep, made of those that training leaves."""
        return shared, private

    @abstractmethod
    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """Image-independent state of K clients; `private=None` asks for the global model (K=1).

        `shared` has a client axis of 1 where all clients hold the same values, as in evaluation.
        """

    @abstractmethod
    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """Class logits (K, B, C) of images (K, B, ...); a client axis of 1 broadcasts."""

    def loss_terms(
        self, shared: Tensors, private: Tensors, encoded: Tensors, batch: Batch
    ) -> dict[str, Tensor]:
        """Weighted loss terms by name, each (K,); their sum is minimised. Default: CE alone."""
        del shared, private
        return {"ce": cross_entropy(self.logits(encoded, batch.inputs), batch)}

    def gradients(
        self, loss_terms: dict[str, Tensor], leaves: Tensors, batch: Batch
    ) -> dict[str, Tensor | None]:
        """Gradients (K, ...) by which the optimiser moves `leaves`, e.g. `shared.ctx`.

        Default: those of the sum of all terms; None where a leaf has no part in it. The graph is
        needed once more where a subclass asks for gradients of several sums.
        """
        total = torch.stack(list(loss_terms.values())).sum(0).sum()
        found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        return dict(zip(leaves, found, strict=True))

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


def stack(items: list[Tensors], device: torch.device | str = "cpu") -> Tensors:
    """Named tensors of K clients with a leading client axis, on `device`."""
    return {k: torch.stack([item[k] for item in items]).to(device) for k in items[0]}
