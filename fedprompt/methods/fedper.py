"""FedPer: any prompt method, with a part of the shared prompts that stays on the client.

Source: Federated Learning with Personalization Layers (Arivazhagan, Aggarwal, Singh, Choudhary,
arXiv 1912.00818): the lower layers are averaged, the upper ones stay on the client; both are
trained together.

For prompts, the config names the personal part: whole tensors (`private`, by name), and the last
`private_tokens` tokens of the tensors in `token_tensors`. The rest is uploaded, so the upload is
smaller than the base's. All clients start from the same values. A model is incomplete without its
personal part, so there is no global model.

How we differ: the paper divides a network by layers; the split by tokens is ours, and so is its
default. The alternation of FedRep (Collins et al., ICML 2021: first the personal part, then the
shared one, each with the other fixed) is not implemented.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.fields import option
from fedprompt.errors import UserError, did_you_mean
from fedprompt.methods.base import Batch, RoundInfo, Task, Tensors
from fedprompt.methods.method_config import allows_other_image_towers
from fedprompt.methods.parts.nested import Layout
from fedprompt.methods.parts.wrapper import BASE, WrappedMethod, WrapperConfig

PERSONAL = "personal"
"""The part of the private container that holds what the base would share."""


@dataclass(frozen=True)
class FedPerConfig(WrapperConfig):
    """Which part of the prompts stays on the client."""

    @property
    def token_space(self) -> bool:
        """The base's declaration."""
        return allows_other_image_towers(self._base())

    private: list[str] = option([], "shared tensors of the base that stay whole, e.g. '*deep*'")
    private_tokens: int = option(4, "last tokens of each prompt that stay", ge=0)
    token_tensors: list[str] = option(["*"], "prompts that are split, by name, e.g. 'ctx*'")

    def check(self) -> None:
        """Refuse a config in which nothing is personal."""
        super().check()
        if not self.private and self.private_tokens == 0:
            raise UserError("no prompt is personal: set 'private' or 'private_tokens'.")


class FedPer(WrappedMethod):
    """The base on shared tensors that are joined from both containers."""

    name = "fedper"
    source = "Arivazhagan et al., 2019"
    Config = FedPerConfig

    def __init__(self, config: FedPerConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.has_global = False
        shared = self.base.init_shared(0)
        learned = {n: shared[n] for n in self.learned}
        self.whole = _matching(config.private, learned, "private")
        self.split: tuple[str, ...] = ()
        if config.private_tokens:
            matching = _matching(config.token_tensors, learned, "token_tensors")
            self.split = tuple(n for n in matching if n not in self.whole)
        for name in self.split:
            shape = tuple(shared[name].shape)
            # Tokens are the last axis but one, and at least one of them has to be uploaded.
            if len(shape) < 2 or shape[-2] <= config.private_tokens:
                raise UserError(
                    f"fedper: {config.private_tokens} tokens of '{name}' {shape} cannot stay; "
                    "lower method.private_tokens, or leave it out of method.token_tensors."
                )
        uploaded = [n for n in (*shared, *self.base.init_extras(0)) if n not in self.whole]
        self.shared_layout = Layout().with_part(BASE, uploaded)
        personal = [*self.whole, *self.split]
        self.private_layout = self.private_layout.with_part(PERSONAL, personal, "fedper.")
        # A personal part learns at the rate that its tensor has in the base.
        self.lr_scale = {
            **self.base.lr_scale,
            **{
                f"private.{flat}": self.base.lr_scale[f"shared.{n}"]
                for n, flat in self.private_layout.flat_names[PERSONAL].items()
                if f"shared.{n}" in self.base.lr_scale
            },
        }

    def _divide(self, shared: Tensors) -> tuple[Tensors, Tensors]:
        """The uploaded and the personal part of the base's shared tensors."""
        n = self.config.private_tokens
        uploaded = {name: t for name, t in shared.items() if name not in self.whole}
        personal = {name: shared[name] for name in self.whole}
        for name in self.split:
            # `split` is empty if n is 0, in which case `:-n` would select nothing.
            uploaded[name] = shared[name][..., :-n, :]
            personal[name] = shared[name][..., -n:, :]
        return uploaded, personal

    def _join(self, uploaded: Tensors, personal: Tensors) -> Tensors:
        """The base's shared tensors; a client axis of 1 of the uploaded part broadcasts."""
        joined = dict(uploaded)
        for name in self.whole:
            joined[name] = personal[name]
        for name in self.split:
            tail = personal[name]
            # In evaluation, shared tensors that are equal on all clients have a client axis of 1;
            # the joined prompt differs by client all the same.
            head = uploaded[name].expand(len(tail), *uploaded[name].shape[1:])
            joined[name] = torch.cat([head, tail], dim=-2)
        return joined

    def _base_view(self, shared: Tensors, private: Tensors) -> tuple[Tensors, Tensors, Tensors]:
        """The base's shared and private tensors, and the personal part of the shared ones."""
        parts = self.private_layout.nest(private)
        return self._join(shared, parts[PERSONAL]), parts[BASE], parts[PERSONAL]

    def _joined_round(self, round_info: RoundInfo, personal: Tensors) -> RoundInfo:
        """The round as if the current personal part had been received too.

        A base that compares with what it received needs the shapes that it knows.
        """
        return replace(round_info, received=self._join(round_info.received, personal))

    def init_shared(self, seed: int) -> Tensors:
        """The uploaded part of the base's shared tensors."""
        return self._divide(self.base.init_shared(seed))[0]

    def init_private(self, seed: int, client: int) -> Tensors:
        """The base's private tensors, and the personal part of its shared ones."""
        personal = self._divide(self.base.init_shared(seed))[1]
        private = self.base.init_private(seed, client)
        return self.private_layout.flatten({BASE: private, PERSONAL: personal})

    def start_round(
        self, shared: Tensors, private: Tensors, round_info: RoundInfo
    ) -> tuple[Tensors, Tensors]:
        """Join the tensors, let the base prepare them, and divide the result."""
        s, p, personal = self._base_view(shared, private)
        s, p = self.base.start_round(s, p, self._joined_round(round_info, personal))
        uploaded, personal = self._divide(s)
        return uploaded, self.private_layout.flatten({BASE: p, PERSONAL: personal})

    def at_rest(self, private: Tensors, round_info: RoundInfo) -> Tensors:
        """The base's tensors at rest; of a divided one, both parts."""
        parts = self.private_layout.nest(private)
        rest = self.base.at_rest(parts[BASE], self._joined_round(round_info, parts[PERSONAL]))
        for n, flat in self.private_layout.flat_names[PERSONAL].items():
            if f"shared.{n}" in rest:
                rest[f"private.{flat}"] = rest[f"shared.{n}"]
        return {
            n: rest_K for n, rest_K in rest.items() if n.removeprefix("shared.") not in self.whole
        }

    def end_round(
        self, shared: Tensors, private: Tensors, round_info: RoundInfo
    ) -> tuple[Tensors, Tensors]:
        """Join the tensors, let the base finish them, and divide the result."""
        s, p, personal = self._base_view(shared, private)
        s, p = self.base.end_round(s, p, self._joined_round(round_info, personal))
        uploaded, personal = self._divide(s)
        return uploaded, self.private_layout.flatten({BASE: p, PERSONAL: personal})

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """The client's model: the base's encoding of the joined tensors."""
        assert private is not None, "fedper has no global model"
        s, p, _ = self._base_view(shared, private)
        return self.base.encode(s, p)

    def loss_terms(
        self, shared: Tensors, private: Tensors, encoded: Tensors, batch: Batch
    ) -> dict[str, Tensor]:
        """The base's terms, each (K,)."""
        s, p, personal = self._base_view(shared, private)
        # What was received is constant, so no gradient may flow through the personal part of it.
        fixed = {n: t.detach() for n, t in personal.items()}
        seen = replace(batch, round_info=self._joined_round(batch.round_info, fixed))
        return self.base.loss_terms(s, p, encoded, seen)


def _matching(patterns: list[str], tensors: Tensors, key: str) -> tuple[str, ...]:
    """Find the tensors that match any of the patterns of `method.<key>`.

    Args:
        patterns: shell-style patterns of names.
        tensors: the base's learned shared tensors.
        key: name of the config key, for the message.

    Returns:
        Names in the order of `tensors`.

    Raises:
        UserError: a pattern matches no tensor.
    """
    for pattern in patterns:
        if not any(fnmatchcase(n, pattern) for n in tensors):
            hint = did_you_mean(pattern, list(tensors))
            raise UserError(
                f"fedper: method.{key} names '{pattern}', which the base does not share.{hint}"
            )
    return tuple(n for n in tensors if any(fnmatchcase(n, p) for p in patterns))
