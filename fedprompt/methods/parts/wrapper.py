"""The common part of methods that turn any prompt method into a variant of itself.

FedProx, SCAFFOLD, Ditto, FedPer, PLPP and GRAM derive from `WrappedMethod`. A wrapper holds a
`base` method and delegates to it; a subclass overrides what it changes. Tensors that a wrapper adds
form parts of their own beside the base's tensors (`nested.py`), and the base never sees them.

Suffix: K clients.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.fields import build, option
from fedprompt.config.search import Range, Space
from fedprompt.data.features.inputs import Inputs
from fedprompt.errors import UserError
from fedprompt.methods.base import (
    Batch,
    ClientData,
    Method,
    MethodConfig,
    RoundInfo,
    Task,
    Tensors,
)
from fedprompt.methods.parts.nested import Layout, Parts
from fedprompt.methods.registry import method_class

BASE = "base"
"""The part of each container that holds the base's own tensors."""


@dataclass(frozen=True)
class WrapperConfig(MethodConfig):
    """Which method is wrapped; a subclass adds keys of its own."""

    base: str = option("promptfl", "the method that is wrapped")
    options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "keys of the wrapped method, as under 'method'"}
    )

    @property
    def lr_space(self) -> Range | None:
        """The base's."""
        return self._base().lr_space

    @property
    def search_spaces(self) -> Mapping[str, Space]:
        """The wrapper's own, and the base's under `options`."""
        of_base = {f"options.{key}": space for key, space in self._base().search_spaces.items()}
        return {**super().search_spaces, **of_base}

    @property
    def default_strategy(self) -> Mapping[str, Any]:
        """The base's."""
        return self._base().default_strategy

    @property
    def supported_strategies(self) -> frozenset[str] | None:
        """The base's."""
        return self._base().supported_strategies

    @property
    def needs_float64(self) -> bool:
        """The base's."""
        return self._base().needs_float64

    @property
    def reveals_classes(self) -> bool:
        """The base's."""
        return self._base().reveals_classes

    @property
    def refines(self) -> bool:
        """The base's."""
        return self._base().refines

    @property
    def learns_without_labels(self) -> bool:
        """The base's."""
        return self._base().learns_without_labels

    @property
    def relabel_every(self) -> int:
        """The base's."""
        return self._base().relabel_every

    @property
    def companions(self) -> tuple[str, ...]:
        """The base's."""
        return self._base().companions

    def check(self) -> None:
        """Check the base's config, and complete `options` with its defaults."""
        try:
            complete = dataclasses.asdict(self.base_config())
        except UserError as error:
            # The caller puts "config: " in front of the message once more.
            raise UserError(str(error).removeprefix("config: ")) from None
        # `options` is completed here so that the config.yaml of a run folder lists every key.
        object.__setattr__(self, "options", {k: v for k, v in complete.items() if k != "name"})

    def base_config(self) -> Any:
        """Build the base's own config from `options`.

        Returns:
            An instance of the base's `Config`, with its defaults filled in.

        Raises:
            UserError: an unknown or unsuitable base, or an invalid key; the message names
                `method.options.<key>`.
        """
        cls = base_class(self.base)
        if "name" in self.options:
            raise UserError("config: method.options.name: set method.base to choose the method.")
        return build(cls.Config, {"name": self.base, **self.options}, "method.options")

    def _base(self) -> MethodConfig:
        config: MethodConfig = self.base_config()
        return config


def base_class(name: str) -> type[Method]:
    """Return the class of the method called `name`, which is to be wrapped.

    Raises:
        UserError: there is no such method, it is a wrapper itself, or it trains nothing.
    """
    cls = method_class(name)
    if issubclass(cls, WrappedMethod):
        raise UserError(f"config: method.base is '{name}', which wraps a method itself.")
    if not cls.trainable:
        raise UserError(f"config: method.base is '{name}', which trains nothing.")
    return cls


class WrappedMethod(Method):
    """A method that behaves like its base; subclasses add tensors, loss terms or both.

    A subclass that adds tensors extends `shared_layout` and `private_layout` in `__init__`, and
    works on the nested containers that they give. One that adds loss terms names them in
    `term_names` and returns them from `extra_loss_terms`.

    The base's `gradients` sees the base's terms only, so a base that projects or clips its
    gradients behaves as it does alone. Plain gradients of the wrapper's terms are then added.

    Attributes:
        base: the wrapped method.
        learned: names of the base's shared tensors that are trained.
        shared_layout: the parts of the shared container, including the base's extras.
        private_layout: the parts of the private container.

    Raises:
        UserError: the base shares nothing that is trained.
    """

    Config = WrapperConfig
    term_names: ClassVar[tuple[str, ...]] = ()
    """Names of the terms that `extra_loss_terms` returns."""

    @classmethod
    def needs_of(cls, config: Any) -> frozenset[str]:
        """The base's."""
        return base_class(config.base).needs_of(config.base_config())

    def __init__(self, config: Any, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        base = base_class(config.base)(config.base_config(), clip, task)
        self.base = base
        # These are read from the instance: a base may set them in its constructor, by its config.
        self.needs = base.needs
        self.needs_to_train = base.needs_to_train
        self.reads_descriptions = base.reads_descriptions
        self.frozen = base.frozen
        self.measured = base.measured
        self.teacher = base.teacher
        self.lr_scale = dict(base.lr_scale)
        self.has_global = base.has_global
        self.fixed_global = base.fixed_global
        self.no_transfer_reason = base.no_transfer_reason
        self.no_graph_reason = base.no_graph_reason
        self.images_at_once = base.images_at_once
        # Only names are needed here, and they do not depend on the seed or the client.
        shared = base.init_shared(0)
        self.learned = tuple(n for n in shared if f"shared.{n}" not in base.frozen)
        if not self.learned:
            raise UserError(f"method '{self.name}' needs shared prompts; '{config.base}' has none.")
        self.shared_layout = Layout().with_part(BASE, [*shared, *base.init_extras(0)])
        self.private_layout = Layout().with_part(BASE, base.init_private(0, 0))

    def extra_loss_terms(self, shared: Parts, private: Parts, batch: Batch) -> Tensors:
        """The weighted loss terms (K,) that the wrapper adds.

        Args:
            shared: the parts of the shared container, with the base's extras; (K, ...).
            private: the parts of the private container, (K, ...).
            batch: the step, as the wrapper sees it.

        Returns:
            A (K,) tensor for every name in `term_names`.
        """
        return {}

    def base_round(self, round_info: RoundInfo) -> RoundInfo:
        """The round as the base sees it, in which only the base's part was received."""
        received = self.shared_layout.nest(round_info.received)[BASE]
        return replace(round_info, received=received)

    def base_batch(self, batch: Batch) -> Batch:
        """The step as the base sees it."""
        return replace(batch, round_info=self.base_round(batch.round_info))

    def init_shared(self, seed: int) -> Tensors:
        """The base's."""
        return self.base.init_shared(seed)

    def init_private(self, seed: int, client: int) -> Tensors:
        """The base's."""
        return self.base.init_private(seed, client)

    def init_extras(self, seed: int) -> Tensors:
        """The base's."""
        return self.base.init_extras(seed)

    def init_private_from_data(self, private: Tensors, data: ClientData, seed: int) -> Tensors:
        """Let the base complete its own part; the wrapper's parts stay as they are."""
        parts = self.private_layout.nest(private)
        parts[BASE] = self.base.init_private_from_data(parts[BASE], data, seed)
        return self.private_layout.flatten(parts)

    def start_round(
        self, shared: Tensors, private: Tensors, round_info: RoundInfo
    ) -> tuple[Tensors, Tensors]:
        """Let the base prepare its own parts; the wrapper's parts stay as they are."""
        s, p = self.shared_layout.nest(shared), self.private_layout.nest(private)
        s[BASE], p[BASE] = self.base.start_round(s[BASE], p[BASE], self.base_round(round_info))
        return self.shared_layout.flatten(s), self.private_layout.flatten(p)

    def at_rest(self, private: Tensors, round_info: RoundInfo) -> Tensors:
        """The base's; a wrapper that copies the base's tensors adds the copies."""
        base_private = self.private_layout.nest(private)[BASE]
        return self.base.at_rest(base_private, self.base_round(round_info))

    def end_round(
        self, shared: Tensors, private: Tensors, round_info: RoundInfo
    ) -> tuple[Tensors, Tensors]:
        """Let the base finish its own parts; the wrapper's parts stay as they are."""
        s, p = self.shared_layout.nest(shared), self.private_layout.nest(private)
        s[BASE], p[BASE] = self.base.end_round(s[BASE], p[BASE], self.base_round(round_info))
        return self.shared_layout.flatten(s), self.private_layout.flatten(p)

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """The base's encoding of its own tensors."""
        base_shared = self.shared_layout.nest(shared)[BASE]
        base_private = None if private is None else self.private_layout.nest(private)[BASE]
        return self.base.encode(base_shared, base_private)

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """The base's logits (K, B, C)."""
        return self.base.logits(encoded, inputs)

    def loss_terms(
        self, shared: Tensors, private: Tensors, encoded: Tensors, batch: Batch
    ) -> dict[str, Tensor]:
        """The base's terms and the wrapper's, each (K,)."""
        s, p = self.shared_layout.nest(shared), self.private_layout.nest(private)
        terms = self.base.loss_terms(s[BASE], p[BASE], encoded, self.base_batch(batch))
        return terms | self.extra_loss_terms(s, p, batch)

    def gradients(
        self, loss_terms: dict[str, Tensor], leaves: Tensors, batch: Batch
    ) -> dict[str, Tensor | None]:
        """The base's gradients of its terms, plus those of the wrapper's."""
        extra_terms = [t for n, t in loss_terms.items() if n in self.term_names]
        base_terms = {n: t for n, t in loss_terms.items() if n not in self.term_names}
        gradients = self.base.gradients(base_terms, leaves, self.base_batch(batch))
        if not extra_terms:
            return gradients
        # The base's backward pass has freed its graph. The extra terms are functions of the leaves
        # alone (`extra_loss_terms` is not given `encoded`), so they have a graph of their own.
        total = torch.stack(extra_terms).sum()
        extra = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        return {n: add(gradients[n], more) for n, more in zip(leaves, extra, strict=True)}

    def refine(
        self, shared: Tensors, uploads: Sequence[Tensors], *, seed: int, server_round: int
    ) -> Tensors:
        """Let the base refine its own part; the wrapper's parts stay as they are."""
        nest = self.shared_layout.nest
        parts, of_base = nest(shared), [nest(upload)[BASE] for upload in uploads]
        refined = self.base.refine(parts[BASE], of_base, seed=seed, server_round=server_round)
        return self.shared_layout.flatten({**parts, BASE: refined})

    def without_classes(self, shared: Tensors, classes: Sequence[int]) -> Tensors | None:
        """The base's; the wrapper's parts stay as they are."""
        parts = self.shared_layout.nest(shared)
        kept = self.base.without_classes(parts[BASE], classes)
        return None if kept is None else self.shared_layout.flatten({**parts, BASE: kept})

    def novelty(self, encoded: Tensors, inputs: Inputs) -> Tensor | None:
        """The base's."""
        return self.base.novelty(encoded, inputs)

    def class_embeddings(self, encoded: Tensors) -> Tensor | None:
        """The base's."""
        return self.base.class_embeddings(encoded)


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum of two gradients, where None counts as zero; None if both are None."""
    if a is None or b is None:
        return b if a is None else a
    return a + b


def squared_distance(a: Tensors, b: Tensors) -> Tensor:
    """Squared L2 distance (K,) between tensors (K, ...), over the names of `a`."""
    return torch.stack([(t - b[n]).square().flatten(1).sum(1) for n, t in a.items()]).sum(0)
