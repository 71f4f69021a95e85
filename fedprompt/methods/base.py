"""The contract of a prompt-learning method: what it shares, what it keeps, its logits and its loss.

Every module of `fedprompt.methods` implements `Method`. The server calls a method to obtain the
starting tensors and to score the global model; the clients call it to train and to score their
personal models. A method knows neither Flower nor the strategy that aggregates its tensors.

Shape suffixes: K clients, B images of a batch, C classes, D joint embedding. Image features and
class features are L2-normalised, and `clip.logit_scale` multiplies their cosine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.text_tokens import refuse_twins
from fedprompt.backbone.token_routing import TokenRouting
from fedprompt.data.dataset import UNLABELLED
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.batch import (
    Batch,
    ClientData,
    RoundInfo,
    Task,
    Tensors,
    row_of,
    stack,
)
from fedprompt.methods.method_config import UNIFORM_AVERAGE, MethodConfig
from fedprompt.methods.parts.label_sets import against, frozen_negative, label_set_loss
from fedprompt.methods.parts.losses import cross_entropy, masked_mean

__all__ = [
    "UNIFORM_AVERAGE",
    "UNLABELLED",
    "Batch",
    "ClientData",
    "Method",
    "MethodConfig",
    "RoundInfo",
    "Task",
    "Tensors",
    "row_of",
    "stack",
    "takes_label_sets",
    "takes_steps",
    "uploaded_numbers",
]


class Method(ABC):
    """One paper's method: pure functions on named tensors, in one file.

    Shared and private tensors are two containers, `dict[str, Tensor]` each, so no filter of names
    decides what leaves a client. The server sends `shared` and aggregates it; `private` never
    leaves the client.

    When the members are called:

    1. Before the first round, the server calls `init_shared` and `init_extras`. When a client is
       seen for the first time, it calls `init_private` and then `init_private_from_data`. None of
       these tensors has a client axis.
    2. In a round, K clients train together. All tensors carry a leading client axis K:

           shared, private = start_round(shared, private, round_info)
           at_rest(private, round_info)                which clients do not train which tensors
           for each batch:
               encoded = encode(shared, private)
               terms = loss_terms(shared, private, encoded, batch)
               gradients(terms, leaves, batch)         the optimiser then updates the leaves
           shared, private = end_round(shared, private, round_info)
           shared_from_data(data)                  what is computed and not trained

       The client uploads the `shared` tensors that `end_round` returns and stores `private`. The
       strategy aggregates the uploads, and if the config says `refines`, the server calls `refine`.
    3. In evaluation, `encode` is called once per model and `logits` once per batch of images.

    Every member must be pure: it modifies neither its arguments nor the method, and the same
    arguments give the same result. Random numbers come from `seed`, `round_info.normal` or
    `batch.normal`, never from a global generator. Clients never mix: row k of a result depends only
    on row k of the arguments, which is what makes training K clients together exact.

    An attribute that depends on the config is set on the instance in `__init__`.

    Args:
        config: an instance of the class's `Config`.
        clip: the frozen backbone.
        task: class names and templates.

    Raises:
        UserError: the config does not fit the backbone or the class names.
    """

    name: ClassVar[str]
    """The name of the module, which is also the value of `method.name` in a config."""
    source: ClassVar[str]
    """Authors, venue and year, for the table of methods."""
    Config: ClassVar[type[Any]]
    """The method's `MethodConfig`."""

    needs: frozenset[str] = frozenset({"features"})
    """What `logits` reads of an image: `features`, optionally `patches`, `local`, `pixels`,
    `routing` or `statistics`."""
    needs_to_train: frozenset[str] = frozenset()
    """What only `loss_terms` reads besides; test images come without it. `second_view` asks for the
    features of another view of each image (`Batch.second_KBD`)."""
    frozen: frozenset[str] = frozenset()
    """Tensors that the optimiser does not update, such as `private.keys` or `shared.counts`."""
    measured: frozenset[str] = frozenset()
    """Entries of `loss_terms` that are reported and not minimised, such as a drift; detached."""
    lr_scale: Mapping[str, float] = MappingProxyType({})
    """Factors of the learning rate by tensor, such as `private.gate: 5.0`; 1 for all others."""
    teacher: FrozenCLIP | None = None
    """A further frozen model whose image features are `Inputs.teacher` in training; None for none.
    """
    routing: TokenRouting | None = None
    """How the tokens of an image are routed to experts, for methods that need `routing`."""
    domains: int | None = None
    """How many domains the method tells apart, of which client k has number k modulo this; None for
    methods that know of no domains."""
    multi_label: ClassVar[bool] = False
    """Whether the method also learns images with several labels each: whether it reads labels by
    `label_loss` alone. It is not inherited, since a method that derives from another one may read
    them otherwise."""
    reads_descriptions: bool = False
    """Whether it learns from `Task.sentences`; a run without `data.descriptions` then says so."""
    trainable: bool = True
    """Whether there is anything to learn; if not, a run has no rounds."""
    has_global: bool = True
    """Whether the shared tensors alone are a model, so that `encode(shared, None)` works."""
    fixed_global: bool = False
    """Whether that model is the same whatever clients share, such as zero-shot CLIP."""
    no_transfer_reason: str | None = None
    """Why the tensors mean nothing for other class names; None if they do transfer."""
    no_graph_reason: str | None = None
    """Why a local step cannot be recorded and replayed (`parts/step_graphs.py`); None if it can, or
    if the recording itself finds out, as it does of draws and of the number of the step."""
    images_at_once: int = 4096
    """Largest number of images in one call of `logits` in evaluation; it bounds the memory."""

    @classmethod
    def needs_of(cls, config: Any) -> frozenset[str]:
        """`needs` of a method with this config, before a backbone is open.

        Args:
            config: an instance of `Config`.
        """
        return cls.needs

    def __init__(self, config: Any, clip: FrozenCLIP, task: Task) -> None:
        self.config = config
        self.clip = clip
        self.task = task
        # Every class list of every data source and protocol comes by here.
        refuse_twins(clip, task.class_names)

    @abstractmethod
    def init_shared(self, seed: int) -> Tensors:
        """Starting values of the tensors that the server aggregates, without a client axis.

        Names and shapes must not depend on `seed`. All tensors are float32.
        """

    def init_private(self, seed: int, client: int) -> Tensors:
        """Starting values of the tensors that client `client` keeps, without a client axis.

        The default is none. Names and shapes must be the same for all clients, because private
        tensors are stacked along the client axis; all tensors are float32. A tensor that
        `init_private_from_data` makes as long as the client has images has 0 as its first axis.
        """
        return {}

    def init_extras(self, seed: int) -> Tensors:
        """Placeholders of what the server sends to a client besides the shared tensors.

        A strategy fills in the values in `client_extras`; until it has any, the client receives
        the tensors that this member returns. In `encode` and `loss_terms` the extras appear among
        the shared tensors, so their names must differ from those. They are neither trained nor
        uploaded, and the global model is encoded without them, except for those that the strategy
        names in `eval_extras`.
        """
        return {}

    def init_private_from_data(self, private: Tensors, data: ClientData, seed: int) -> Tensors:
        """The tensors of `init_private`, completed from the client's own training images.

        Args:
            private: the result of `init_private`, without a client axis.
            data: the client's training images; they have labels unless the method's config says
                `learns_without_labels`.
            seed: the seed of the run.

        Returns:
            New tensors with the same names and shapes. Only a first axis of 0 may become as long as
            the client has images; in a block of clients, zeros stand behind the shorter ones.
        """
        return private

    def start_round(
        self, shared: Tensors, private: Tensors, round_info: RoundInfo
    ) -> tuple[Tensors, Tensors]:
        """Prepare local training.

        Args:
            shared: the received shared tensors, (K, ...), without the extras.
            private: the stored private tensors, (K, ...).
            round_info: the round; `received` also holds the extras.

        Returns:
            The shared and private tensors (K, ...) from which training starts.
        """
        return shared, private

    def at_rest(self, private: Tensors, round_info: RoundInfo) -> Tensors:
        """Which clients leave which trained tensors unchanged in this round.

        The default is none. `frozen` names the tensors that no client ever trains. A tensor that
        some clients train and others do not, for example from their second visit on, belongs here:
        beside a client that trains it, its gradient on the others is zero and not None, and weight
        decay would move it.

        Args:
            private: the private tensors that `start_round` returned, (K, ...).
            round_info: the round, as in `start_round`.

        Returns:
            By tensor, such as `private.gate`, a boolean tensor (K,): true for the clients that
            keep it as it is.
        """
        return {}

    def end_round(
        self, shared: Tensors, private: Tensors, round_info: RoundInfo
    ) -> tuple[Tensors, Tensors]:
        """Finish local training.

        Args:
            shared: the shared tensors after training, (K, ...), without the extras.
            private: the private tensors after training, (K, ...).
            round_info: the round, as in `start_round`.

        Returns:
            The shared tensors (K, ...) to upload and the private ones to store.
        """
        return shared, private

    @abstractmethod
    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """Everything that does not depend on images, such as the class features.

        Args:
            shared: shared tensors and extras, (K, ...). In evaluation the client axis is 1 where
                all clients hold the same values.
            private: private tensors, (K, ...); None asks for the global model, with K = 1.

        Returns:
            Named tensors (K, ...), or (1, ...) where all clients share a value.
        """

    @abstractmethod
    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """Class logits (K, B, C).

        Args:
            encoded: the result of `encode`.
            inputs: images (K, B, ...); a client axis of 1 on either side broadcasts.
        """

    def loss_terms(
        self, shared: Tensors, private: Tensors, encoded: Tensors, batch: Batch
    ) -> dict[str, Tensor]:
        """The weighted terms of the loss by name, each (K,); their sum is minimised.

        Entries that `measured` names are no part of the sum. The default is the
        cross-entropy `ce` alone. Other methods return `ce` first as well, unless they use no label.

        Args:
            shared: shared tensors and extras, (K, ...).
            private: private tensors, (K, ...).
            encoded: the result of `encode` for these tensors.
            batch: images, labels and mask of the step.

        Returns:
            One (K,) tensor per term, each already multiplied by its weight; `ce` comes first.
        """
        del shared, private
        return self.label_loss(self.logits(encoded, batch.inputs), batch)

    def label_logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """What tests read (K, B, C): `logits`, or how likely each label is (`parts/label_sets.py`).

        Args:
            encoded: the result of `encode`.
            inputs: images, as for `logits`.
        """
        return self._of_labels(self.logits(encoded, inputs), inputs)

    def label_loss(self, logits_KBC: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The loss of the labels (K,), by its name.

        Args:
            logits_KBC: class logits.
            batch: images, labels and mask of the step.

        Returns:
            The cross-entropy as `ce`; in the multi-label task, `asymmetric` or `bce`.
        """
        options = self.task.multi_label
        if options is None:
            return {"ce": cross_entropy(logits_KBC, batch)}
        z_KBC = self._of_labels(logits_KBC, batch.inputs)
        loss_KB = label_set_loss(z_KBC, batch.labels_KB, options)
        return {options.loss: masked_mean(loss_KB, batch.mask_KB)}

    def _of_labels(self, logits_KBC: Tensor, inputs: Inputs) -> Tensor:
        if self.task.multi_label is None:
            return logits_KBC
        return against(self.clip, logits_KBC, inputs.features, self._negative_D)

    @cached_property
    def _negative_D(self) -> Tensor:
        return frozen_negative(self.clip, self.task)

    def gradients(
        self, loss_terms: dict[str, Tensor], leaves: Tensors, batch: Batch
    ) -> dict[str, Tensor | None]:
        """The gradients that the optimiser applies.

        The default differentiates the sum of all terms. A method that projects, clips or adds noise
        to gradients overrides this member. A method that differentiates several sums must keep the
        graph until the last of them (`retain_graph=True`).

        Args:
            loss_terms: the result of `loss_terms`.
            leaves: the trained tensors (K, ...) by container and name, for example `shared.ctx`.
            batch: the step, for random draws.

        Returns:
            A gradient (K, ...) per leaf, or None where the loss does not depend on it.
        """
        # Clients are independent, so the gradient of the sum over clients is each client's own. The
        # sum itself is not needed: its gradient is one everywhere.
        terms = [t for t in loss_terms.values() if t.requires_grad]
        ones = [torch.ones_like(terms[0])] * len(terms) if terms else []
        # A leaf that the loss does not reach gets None, not zeros: torch's optimisers skip None, so
        # that neither weight decay nor momentum moves it.
        gradients = torch.autograd.grad(terms, list(leaves.values()), ones, allow_unused=True)
        return dict(zip(leaves, gradients, strict=True))

    def shared_from_data(self, data: ClientData) -> Tensors:
        """Shared tensors that a client computes from its images instead of training them.

        The default is none. Called at the end of each round in which the client takes part. If
        all tensors of a method are `frozen`, its clients take no local steps and report no losses.

        Args:
            data: the client's training images.

        Returns:
            Some of the tensors of `init_shared`, with their names and shapes, which the client
            uploads in place of those that `end_round` returned.
        """
        return {}

    def refine(
        self, shared: Tensors, uploads: Sequence[Tensors], *, seed: int, server_round: int
    ) -> Tensors:
        """The shared tensors after further training on the server.

        Called after the strategy, in every round in which uploads were aggregated, if the config
        says `refines`. Secure aggregation and asynchronous steps, in which there are no uploads of
        single clients, are then refused. A guarantee of the strategy, such as differential privacy
        or robustness, holds no longer, so `supported_strategies` should name only those without.

        Args:
            shared: the aggregated tensors, without a client axis; they are not changed.
            uploads: what each client uploaded, by client id; at least one.
            seed: the seed of the run.
            server_round: the round, from 1.

        Returns:
            Tensors with the names and shapes of `shared`, on the CPU.
        """
        return shared

    def noisy_from_data(
        self, data: ClientData, noise: Callable[[tuple[int, ...]], Tensor]
    ) -> Tensors:
        """What takes the place of `shared_from_data` with `privacy.image_noise`.

        The default is none, so that nothing leaves without noise.

        Args:
            data: the client's training images.
            noise: draws numbers of a given shape, float64 on the CPU, whose standard deviation is
                the noise multiplier. They are to be multiplied by the largest L2 norm of the
                change of all these tensors together when one image is left out.

        Returns:
            As `shared_from_data`.
        """
        return {}

    def without_classes(self, shared: Tensors, classes: Sequence[int]) -> Tensors | None:
        """The shared tensors without what they hold of some classes, for unlearning.

        Called on the server after training. Nothing may be trained and no image read.

        Args:
            shared: shared tensors, without a client axis; they are not changed.
            classes: label indices of the classes to forget.

        Returns:
            Tensors for `encode`, whose shapes may differ from those of `init_shared`. None, the
            default, if the tensors are not separated by class.
        """
        return None

    def novelty(self, encoded: Tensors, inputs: Inputs) -> Tensor | None:
        """How little each image looks like an image of any known class, for the `ood` protocol.

        Args:
            encoded: the result of `encode`.
            inputs: images, as for `logits`.

        Returns:
            Scores (K, B), the larger the more novel, or None if the method has no head for it.
        """
        return None

    def class_embeddings(self, encoded: Tensors) -> Tensor | None:
        """Vectors (C, D) whose products with plain CLIP image features are the logits.

        They are what `fedprompt export` writes. None if there are no such vectors, for example
        because image prompts or adapters change the image features.
        """
        classes = encoded.get("classes")
        # One model is exported at a time, so the client axis has length 1.
        return None if classes is None else classes[0]


def takes_label_sets(method: type[Method]) -> bool:
    """Whether a method declares `multi_label` itself."""
    return bool(vars(method).get("multi_label", False))


def takes_steps(method: Method) -> bool:
    """Whether clients take local steps: whether there is a tensor that is not `frozen`."""
    names = {f"shared.{n}" for n in method.init_shared(0)}
    names |= {f"private.{n}" for n in method.init_private(0, 0)}
    return not names <= method.frozen


def uploaded_numbers(method: Method) -> int:
    """Number of scalars that a client uploads per round."""
    # Names and shapes do not depend on the seed, so any seed gives the count.
    return sum(t.numel() for t in method.init_shared(0).values())
