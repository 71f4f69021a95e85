"""The common part of methods that turn any prompt method into a variant of itself.

A wrapper owns a `base` method and passes everything on to it; a subclass overrides what it changes.
Tensors that a wrapper adds to either container carry its `prefix`, and the base never sees them.

Suffix: K clients.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.fields import build, option
from fedprompt.data.features.inputs import Inputs
from fedprompt.errors import UserError
from fedprompt.methods.base import Batch, ClientData, Method, RoundInfo, Task, Tensors


@dataclass(frozen=True)
class WrapperConfig:
    """Which method is wrapped. A subclass adds `name` and keys of its own."""

    name: str = option("", "method name")
    base: str = option("promptfl", "the method that is wrapped")
    options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "keys of the wrapped method, as under 'method'"}
    )

    def check(self) -> None:
        """Build the base's config, and complete `options` by its defaults."""
        try:
            complete = dataclasses.asdict(self.base_config())
        except UserError as error:
            raise UserError(str(error).removeprefix("config: ")) from None
        object.__setattr__(self, "options", {k: v for k, v in complete.items() if k != "name"})

    def base_config(self) -> Any:
        """The base's own config, checked; errors name `method.options.<key>`."""
        cls = base_class(self.base)
        if "name" in self.options:
            raise UserError("config: method.options.name: set method.base to choose the method.")
        return build(cls.Config, {"name": self.base, **self.options}, "method.options")


def base_class(name: str) -> type[Method]:
    """The method called `name`; `UserError` where it is unknown, or has nothing to wrap."""
    from fedprompt.methods.registry import method_class  # that package imports the wrappers

    cls = method_class(name)
    if issubclass(cls, WrappedMethod):
        raise UserError(f"config: method.base is '{name}', which wraps a method itself.")
    if not cls.trainable:
        raise UserError(f"config: method.base is '{name}', which trains nothing.")
    return cls


class WrappedMethod(Method):
    """Everything as the base does it; `extra_loss_terms` adds terms to the loss.

    The base's `gradients` sees the base's terms alone, so that a base which projects or clips does
    so as ever; plain gradients of the wrapper's terms are added to what it gives.
    """

    Config = WrapperConfig
    prefix: ClassVar[str]
    """Of the tensors that the wrapper adds, e.g. `control.`."""
    term_names: ClassVar[tuple[str, ...]] = ()
    """Names that `extra_loss_terms` may give."""

    def __init__(self, config: Any, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        base = base_class(config.base)(config.base_config(), clip, task)
        self.base = base
        self.needs = base.needs
        self.frozen = base.frozen
        self.lr_scale = dict(base.lr_scale)
        self.transfers_to_new_classes = base.transfers_to_new_classes
        self.no_transfer_reason = base.no_transfer_reason
        self.images_at_once = base.images_at_once
        if not self.trained(base.init_shared(0)):
            raise UserError(f"method '{self.name}' needs shared prompts; '{config.base}' has none.")

    @classmethod
    def server_rule(cls, config: Any) -> Mapping[str, Any]:
        """The base's."""
        return base_class(config.base).server_rule(config.base_config())

    @classmethod
    def possible_rules(cls, config: Any) -> frozenset[str] | None:
        """The base's, and among them the wrapper's own."""
        if cls.works_with is not None:
            return cls.works_with
        return base_class(config.base).possible_rules(config.base_config())

    def trained(self, shared: Tensors) -> Tensors:
        """The base's shared tensors that are learned: neither received besides, nor frozen."""
        besides = self.base.init_extras(0)
        return {
            n: t
            for n, t in self.without(shared).items()
            if n not in besides and f"shared.{n}" not in self.base.frozen
        }

    def extra_loss_terms(self, shared: Tensors, private: Tensors, batch: Batch) -> Tensors:
        """Weighted loss terms (K,) that the wrapper adds."""
        return {}

    def without(self, tensors: Tensors) -> Tensors:
        """The base's tensors of a container."""
        return {n: t for n, t in tensors.items() if not n.startswith(self.prefix)}

    def own(self, tensors: Tensors) -> Tensors:
        """The wrapper's tensors of a container."""
        return {n: t for n, t in tensors.items() if n.startswith(self.prefix)}

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
        """The base's tensors as the base fills them."""
        return self.own(private) | self.base.init_private_from_data(
            self.without(private), data, seed
        )

    def start_round(
        self, shared: Tensors, private: Tensors, round_info: RoundInfo
    ) -> tuple[Tensors, Tensors]:
        """The base's tensors as the base starts from them."""
        s, p = self.base.start_round(self.without(shared), self.without(private), round_info)
        return self.own(shared) | s, self.own(private) | p

    def end_round(
        self, shared: Tensors, private: Tensors, round_info: RoundInfo
    ) -> tuple[Tensors, Tensors]:
        """The base's tensors as the base leaves them."""
        s, p = self.base.end_round(self.without(shared), self.without(private), round_info)
        return self.own(shared) | s, self.own(private) | p

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """The base's."""
        return self.base.encode(
            self.without(shared), None if private is None else self.without(private)
        )

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """The base's logits (K, B, C)."""
        return self.base.logits(encoded, inputs)

    def loss_terms(
        self, shared: Tensors, private: Tensors, encoded: Tensors, batch: Batch
    ) -> dict[str, Tensor]:
        """The base's terms and the wrapper's, each (K,)."""
        loss_terms = self.base.loss_terms(
            self.without(shared), self.without(private), encoded, batch
        )
        return loss_terms | self.extra_loss_terms(shared, private, batch)

    def gradients(
        self, loss_terms: dict[str, Tensor], leaves: Tensors, batch: Batch
    ) -> dict[str, Tensor | None]:
        """The base's gradients of its terms, plus those of the wrapper's."""
        own = [t for n, t in loss_terms.items() if n in self.term_names]
        rest = {n: t for n, t in loss_terms.items() if n not in self.term_names}
        found = self.base.gradients(rest, leaves, batch)
        if not own:
            return found
        total = torch.stack(own).sum()
        extra = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        return {n: add(found[n], more) for n, more in zip(leaves, extra, strict=True)}

    def class_embeddings(self, encoded: Tensors) -> Tensor | None:
        """The base's."""
        return self.base.class_embeddings(encoded)

    @property
    def has_global(self) -> bool:
        """Whether the base has a global model."""
        return self.base.has_global


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Sum of two gradients; None counts as zero."""
    if a is None or b is None:
        return b if a is None else a
    return a + b


def squared_distance(a: Tensors, b: Tensors) -> Tensor:
    """Squared L2 distance (K,) of tensors (K, ...), over the names of `a`."""
    return torch.stack([(t - b[n]).square().flatten(1).sum(1) for n, t in a.items()]).sum(0)
