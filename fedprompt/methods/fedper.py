"""FedPer: any prompt method of which a part of the shared prompts stays on the client.

Source: Federated Learning with Personalization Layers (Arivazhagan, Aggarwal, Singh, Choudhary,
arXiv 1912.00818): the lower layers are averaged, the upper ones stay; both are trained together.

For prompts the personal part is what the config names: whole tensors (`private`, by name), and the
last `private_tokens` tokens of the tensors in `token_tensors`. The rest is uploaded, so this also
makes the upload smaller. All clients start from the same values. Without its private part a model
is incomplete, so there is no global one.

How we differ: the paper speaks of layers; the split by tokens is ours, and so is its default. The
alternation of FedRep (Collins et al., ICML 2021: first the personal part, then the shared one, each
with the other fixed) is not done.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.fields import option
from fedprompt.errors import UserError, did_you_mean
from fedprompt.methods.base import Batch, RoundInfo, Task, Tensors
from fedprompt.methods.parts.wrapper import WrappedMethod, WrapperConfig


@dataclass(frozen=True)
class FedPerConfig(WrapperConfig):
    """Which part stays."""

    name: str = option("fedper", "method name")
    private: list[str] = option([], "shared tensors of the base that stay whole, e.g. '*deep*'")
    private_tokens: int = option(4, "last tokens of each prompt that stay", ge=0)
    token_tensors: list[str] = option(["*"], "prompts that are split, by name, e.g. 'ctx*'")

    def check(self) -> None:
        """Something must stay."""
        super().check()
        if not self.private and self.private_tokens == 0:
            raise UserError("nothing stays: set 'private' or 'private_tokens'.")


class FedPer(WrappedMethod):
    """The base, with its shared tensors put together from both containers."""

    name = "fedper"
    source = "Arivazhagan et al., 2019"
    Config = FedPerConfig
    prefix = "fedper."

    def __init__(self, config: FedPerConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        start = self.trained(self.base.init_shared(0))
        self.whole = _matching(config.private, start, "private")
        self.split = frozenset[str]()
        if config.private_tokens:
            self.split = _matching(config.token_tensors, start, "token_tensors") - self.whole
        for name in sorted(self.split):
            shape = tuple(start[name].shape)
            if len(shape) < 2 or shape[-2] <= config.private_tokens:
                raise UserError(
                    f"fedper: {config.private_tokens} tokens of '{name}' {shape} cannot stay; "
                    "fewer must, or method.token_tensors must leave it out."
                )
        self.lr_scale = {
            **self.base.lr_scale,
            **{
                f"private.{self.prefix}{n}": self.base.lr_scale[f"shared.{n}"]
                for n in self.whole | self.split
                if f"shared.{n}" in self.base.lr_scale
            },
        }

    def _apart(self, shared: Tensors) -> tuple[Tensors, Tensors]:
        """What is shared, and what stays under the prefix, of the base's shared tensors."""
        stays, n = {}, self.config.private_tokens
        goes = {name: t for name, t in shared.items() if name not in self.whole}
        for name in self.whole:
            stays[self.prefix + name] = shared[name]
        for name in self.split:
            goes[name], stays[self.prefix + name] = (
                shared[name][..., :-n, :],
                shared[name][..., -n:, :],
            )
        return goes, stays

    def _together(self, shared: Tensors, private: Tensors) -> Tensors:
        """The base's shared tensors; a client axis of 1 of the shared part broadcasts."""
        joined = dict(shared)
        for name in self.whole:
            joined[name] = private[self.prefix + name]
        for name in self.split:
            tail = private[self.prefix + name]
            head = shared[name].expand(len(tail), *shared[name].shape[1:])
            joined[name] = torch.cat([head, tail], dim=-2)
        return joined

    def _visit(self, round_info: RoundInfo, private: Tensors) -> RoundInfo:
        """What the base takes for received: with the private part as it is now."""
        return replace(round_info, received=self._together(round_info.received, private))

    def init_shared(self, seed: int) -> Tensors:
        """The base's, without what stays."""
        return self._apart(self.base.init_shared(seed))[0]

    def init_private(self, seed: int, client: int) -> Tensors:
        """The base's, and what stays."""
        stays = self._apart(self.base.init_shared(seed))[1]
        return self.base.init_private(seed, client) | stays

    def start_round(
        self, shared: Tensors, private: Tensors, round_info: RoundInfo
    ) -> tuple[Tensors, Tensors]:
        """As the base starts from the whole tensors."""
        whole, seen = self._together(shared, private), self._visit(round_info, private)
        s, p = self.base.start_round(whole, self.without(private), seen)
        goes, stays = self._apart(s)
        return goes, p | stays

    def end_round(
        self, shared: Tensors, private: Tensors, round_info: RoundInfo
    ) -> tuple[Tensors, Tensors]:
        """As the base leaves the whole tensors."""
        whole, seen = self._together(shared, private), self._visit(round_info, private)
        s, p = self.base.end_round(whole, self.without(private), seen)
        goes, stays = self._apart(s)
        return goes, p | stays

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """The client's model."""
        assert private is not None, "fedper has no global model"
        return self.base.encode(self._together(shared, private), self.without(private))

    def loss_terms(
        self, shared: Tensors, private: Tensors, encoded: Tensors, batch: Batch
    ) -> Tensors:
        """The base's terms, each (K,)."""
        fixed = {n: t.detach() for n, t in private.items()}
        seen = replace(batch, round_info=self._visit(batch.round_info, fixed))
        whole = self._together(shared, private)
        return self.base.loss_terms(whole, self.without(private), encoded, seen)

    @property
    def has_global(self) -> bool:
        """Never: the shared part alone is no model."""
        return False


def _matching(patterns: list[str], tensors: Tensors, key: str) -> frozenset[str]:
    """Names of tensors that match; `UserError` for a pattern that none matches."""
    for pattern in patterns:
        if not any(fnmatchcase(n, pattern) for n in tensors):
            hint = did_you_mean(pattern, list(tensors))
            raise UserError(
                f"fedper: method.{key} names '{pattern}', which the base does not share.{hint}"
            )
    return frozenset(n for n in tensors if any(fnmatchcase(n, p) for p in patterns))
