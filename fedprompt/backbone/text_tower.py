"""Text prompts -> class features, exactly and fast.

Methods call `TextTower` in every training step and evaluation. CLIP's text attention is causal, so
(1) nothing after the end-of-text token matters, (2) the hidden states of `[SOS][context]` do not
depend on the class name that follows, and (3) class names that begin alike have equal hidden states
up to where they differ. The fast path computes the prefix once per prompt, lets the packed suffix
tokens (`packing.py`) attend to it, and evaluates the last layer at the end-of-text positions only
(`text_transformer.py`). The result is that of the usual pass over all positions:
`fedprompt/bench/reference.py` contains that pass, and `tests/backbone/test_text_tower.py` compares
values and gradients of the two.

Where classes share nothing (other positions of the class name, class-specific contexts, adapters)
every class is a sequence of its own, of which only the needed positions are computed, and a bounded
number of classes at a time (`text_sequences.py`).

The plain path runs the tower's own blocks (`text_pass.py`). It serves towers that are not causal,
that have a class embedding or blocks with parts of their own, or that come from Hugging Face.

Shape suffixes: N prompts (all leading dimensions flattened), M context tokens, C classes, G classes
of a group, L text positions, d text width, D joint embedding, J deep layers, F special tokens
before the context, B bins of S suffix slots.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.packing import pack
from fedprompt.backbone.text_bins import BinTransformer, prefers_bins
from fedprompt.backbone.text_sequences import (
    Adapt,
    SequenceTransformer,
    checkpointed,
    chunks,
    place,
    positions_at_once,
)
from fedprompt.backbone.text_tokens import ClassPosition, in_order, tokenise
from fedprompt.backbone.text_transformer import PromptTransformer
from fedprompt.errors import UserError

_Chunk = list[tuple[Tensor, int]]
"""Classes (G,) whose prompts end at the same position, and that position; shortest first."""


class _Plan(NamedTuple):
    """Chunks of classes that are computed together, and the place of every class among them."""

    chunks: list[_Chunk]
    order_C: Tensor


class TextTower:
    """Class features of learned prompts for one class list and one number of context tokens.

    Args:
        clip: the frozen backbone.
        class_names: C class names. They are never shared or aggregated; every class list gets a
            tower of its own.
        context_tokens: M learned tokens.
        position: where the class name stands: `end` (`[SOS][ctx][name].`), `middle`
            (`[SOS][ctx/2][name][ctx/2].`) or `front` (`[SOS][name][ctx].`), as in CoOp (Zhou et
            al., IJCV 2022). `end` with a unified context takes the packed path.
        class_specific: one context per class instead of a unified one (CoOp's CSC).

    Attributes:
        fast: whether calls take the packed path or that of sequences, and not the plain one.
        transformer: the packed path, or None.
        token_ids_CL: the prompts as token ids, with placeholders for the context.

    Raises:
        UserError: a class name needs more positions than the text tower has.
    """

    def __init__(
        self,
        clip: FrozenCLIP,
        class_names: Sequence[str],
        context_tokens: int,
        *,
        position: ClassPosition = "end",
        class_specific: bool = False,
    ) -> None:
        self.clip = clip
        self.class_names = tuple(class_names)
        self.context_tokens = context_tokens
        self.position = position
        self.class_specific = class_specific
        parts = clip.text
        self._tokens = tokenise(clip, self.class_names, context_tokens)
        self.token_ids_CL, self.first = self._tokens.ids_CL, self._tokens.first
        ids_CL, slots_CM = in_order(self._tokens, context_tokens, position)
        self._ids_CL, self._slots_CM = ids_CL.to(clip.device), slots_CM.to(clip.device)
        self._plans: dict[int, _Plan] = {}
        self._lengths_C = parts.lengths(self._tokens.end_C)
        self.fast = parts.fast
        packed = parts.packable and position == "end" and not class_specific
        self.transformer = self._prepare() if packed else None

    @property
    def positions(self) -> int:
        """Text positions that go through the tower for one prompt, all classes together."""
        if self.transformer is not None:
            return self.transformer.rows
        return self._sequence_positions

    @cached_property
    def _sequence_positions(self) -> int:
        """Positions of all classes where each is a sequence of its own."""
        return int(self._lengths_C.sum())

    def __call__(
        self,
        context: Tensor,
        deep: Tensor | None = None,
        *,
        adapt: Adapt | None = None,
        clients: int = 1,
    ) -> Tensor:
        """Class features of prompts.

        Args:
            context: (..., M, d), or (..., C, M, d) when `class_specific`.
            deep: (..., J, M, d); entry j replaces the context positions at the input of layer
                j + 1 (deep text prompts as in MaPLe; Khattak et al., CVPR 2023). Where contexts are
                class-specific, it may have fewer than M tokens, which replace the first ones.
            adapt: adds to the output of blocks. It may turn the context of one client (1, M, d)
                into those of K: then the features are (K, C, D).
            clients: this K.

        Returns:
            (..., C, D), float32, not normalised.

        Raises:
            UserError: there are deep prompts for more layers than follow the first, or adapters for
                blocks that have no place for them.
        """
        tail = 3 if self.class_specific else 2
        lead = context.shape[:-tail]
        context_N = context.reshape(math.prod(lead), *context.shape[-tail:])
        deep_N = None if deep is None else deep.reshape(context_N.shape[0], *deep.shape[-3:])
        if deep_N is not None and deep_N.shape[1] >= len(self.clip.text.blocks):
            raise UserError(
                f"{deep_N.shape[1]} deep prompts were given, but {self.clip.name}'s text tower has "
                f"room for {len(self.clip.text.blocks) - 1} after its first layer."
            )
        if adapt is not None:
            self.clip.text.check_adapters(self.clip.name)
        prompts = max(clients, context_N.shape[0])
        if self.transformer is not None and adapt is None:
            self.clip.positions_encoded += prompts * self.transformer.rows
            features_NCD = self._packed(context_N, deep_N)
        else:
            self.clip.positions_encoded += prompts * self._sequence_positions
            features_NCD = self._in_chunks(context_N, deep_N, adapt, prompts)
        if adapt is not None:
            return features_NCD.float()
        return features_NCD.float().reshape(*lead, *features_NCD.shape[-2:])

    def _in_chunks(
        self, context_N: Tensor, deep_NJMd: Tensor | None, adapt: Adapt | None, prompts: int
    ) -> Tensor:
        """Features (N, C, D), a bounded number of classes at a time."""
        plan = self._plan(prompts)
        path = self._sequences if self.fast else self._plain
        run = partial(path, context_N, deep_NJMd, adapt)
        # A single chunk is not worth computing twice.
        once = len(plan.chunks) == 1
        features = [run(c) if once else checkpointed(run, c) for c in plan.chunks]
        return torch.cat(features, dim=1)[:, plan.order_C]

    def _plan(self, prompts: int) -> _Plan:
        """How the classes of `prompts` prompts are computed; on the device, and made only once."""
        parts, device = self.clip.text, self.clip.device
        most = positions_at_once(device, len(parts.blocks), parts.width) // prompts
        if most not in self._plans:
            found, in_turn = [], chunks(self._lengths_C, most)
            for classes in in_turn:
                ends, counts = self._tokens.end_C[classes].unique_consecutive(return_counts=True)
                groups = classes.to(device).split(counts.tolist())
                found.append(list(zip(groups, ends.tolist(), strict=True)))
            self._plans[most] = _Plan(found, torch.cat(in_turn).argsort().to(device))
        return self._plans[most]

    # The packed path

    @torch.no_grad()
    def _prepare(self) -> PromptTransformer | BinTransformer:
        parts, ids = self.clip.text, self.token_ids_CL
        start, device = self.first + self.context_tokens, self.clip.device
        suffixes = [
            row[start : end + 1].tolist()
            for row, end in zip(ids, self._tokens.end_C.tolist(), strict=True)
        ]
        kind = BinTransformer if prefers_bins(device) else PromptTransformer
        packing = pack(suffixes, start, parts.width, repeats_prefix=kind is BinTransformer)
        embedding, position_Ld = parts.token_embedding, parts.positional_embedding_Ld
        suffix_BSd = embedding(packing.token_BS.to(device))
        suffix_BSd = suffix_BSd + position_Ld[start + packing.depth_BS.to(device)]
        before_Fd = embedding(ids[0, : self.first].to(device)) + position_Ld[: self.first]
        return kind(
            self.clip.text_layers,
            packing,
            suffix_BSd.float(),
            before_Fd.float(),
            self.context_tokens,
            parts.heads,
        )

    # No autocast here and in `_sequences`: the layers have their own dtype.

    def _packed(self, context_NMd: Tensor, deep_NJMd: Tensor | None) -> Tensor:
        parts = self.clip.text
        positions_Md = parts.positional_embedding_Ld[self.first :][: self.context_tokens]
        assert self.transformer is not None
        hidden_NCd = self.transformer(context_NMd.float() + positions_Md, deep_NJMd)
        return parts.project(parts.ln_final(hidden_NCd))

    # Sequences, and the plain path

    def _sequences(
        self, context_N: Tensor, deep_NJMd: Tensor | None, adapt: Adapt | None, chunk: _Chunk
    ) -> Tensor:
        """Features (N, classes of the chunk, D)."""
        parts = self.clip.text
        groups = [self.assemble(context_N, some, end + 1) for some, end in chunk]
        transformer = SequenceTransformer(self.clip.text_layers, parts.blocks, parts.heads)
        hidden_NGd = transformer(groups, deep_NJMd, adapt)
        return parts.project(parts.ln_final(hidden_NGd))

    def _plain(
        self, context_N: Tensor, deep_NJMd: Tensor | None, adapt: Adapt | None, chunk: _Chunk
    ) -> Tensor:
        """As `_sequences`, by open_clip's own blocks."""
        with self.clip.autocast():
            features = [
                self._plain_group(context_N, deep_NJMd, adapt, some, end) for some, end in chunk
            ]
        return torch.cat(features, dim=1)

    def _plain_group(
        self,
        context_N: Tensor,
        deep_NJMd: Tensor | None,
        adapt: Adapt | None,
        classes: Tensor,
        end: int,
    ) -> Tensor:
        """Features (N, G, D) of classes whose prompts end at the same position.

        Positions after the end of the text are not computed where no other position sees them.
        """
        parts = self.clip.text
        length = int(parts.lengths(torch.tensor(end)))
        embedded_NGLd, slots_GM = self.assemble(context_N, classes, length)

        def enter(i: int, x_NGLd: Tensor) -> Tensor:
            if deep_NJMd is None or not 0 < i <= deep_NJMd.shape[1]:
                return x_NGLd
            deep_NGMd = deep_NJMd[:, i - 1, None].expand(*x_NGLd.shape[:2], -1, -1)
            return place(x_NGLd, slots_GM, deep_NGMd.to(x_NGLd))

        ids_GL, deep = self._ids_CL[classes, :length], None if deep_NJMd is None else enter
        pooled_NGd = parts.own_pass(embedded_NGLd, ids_GL, end, deep, adapt)
        # ln_final works on each position by itself: it may follow the pooling.
        return parts.project(parts.ln_final(pooled_NGd))

    def assemble(self, context_N: Tensor, classes: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Build the embeddings at the input of the first layer.

        Args:
            context_N: (N, M, d), or (N, C, M, d) when `class_specific`.
            classes: (G,), indices of classes, on the device.
            length: positions to assemble, from the first.

        Returns:
            Embeddings with positions (N, G, length, d), and the positions (G, M) of the context.
        """
        parts, n, g = self.clip.text, context_N.shape[0], len(classes)
        slots_GM = self._slots_CM[classes]
        embedded_GLd = parts.token_embedding(self._ids_CL[classes, :length])
        x_NGLd = embedded_GLd.expand(n, *embedded_GLd.shape)
        if self.class_specific:
            values = context_N[:, classes].to(x_NGLd)
        else:
            values = context_N[:, None].expand(n, g, -1, -1).to(x_NGLd)
        return place(x_NGLd, slots_GM, values) + parts.positional_embedding_Ld[:length], slots_GM
