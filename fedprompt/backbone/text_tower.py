"""Prompts -> class features, exactly and fast.

CLIP's text attention is causal, so (1) nothing after the end-of-text token matters, (2) the hidden
states of `[SOS][context]` do not depend on the class name that follows, and (3) those of names that
begin alike agree as far as they do. The fast path computes the prefix once per prompt, lets the
packed suffix tokens (`packing.py`) attend to it, and evaluates the last layer at the end-of-text
positions only (`text_transformer.py`). The mathematics is that of the usual pass over all
positions; `fedprompt/bench/reference.py` holds that pass, and `tests/backbone/test_text_tower.py`
holds the two together on values and gradients.

Shape suffixes: N prompts (all leading dimensions flattened), M context tokens, C classes, d text
width, D joint embedding, J deep layers, F special tokens before the context, B bins of S suffix
slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.packing import pack
from fedprompt.backbone.text_parts import TextParts
from fedprompt.backbone.text_transformer import PromptTransformer
from fedprompt.errors import UserError

ClassPosition = Literal["end", "middle", "front"]
Adapt = Callable[[int, Any, Tensor], Tensor | None]
"""Layer, its block and its input (N, classes, positions, d) -> what its output gains, or None.
An axis N of 1 in the input may come out longer."""
PLACEHOLDER = "X"


class TextTower:
    """Class features of learned prompts for one class list and one number of context tokens.

    Args:
        clip: the frozen backbone.
        class_names: C class names; rebuilt for every class list, never shared or aggregated.
        context_tokens: M learned tokens.
        position: where the class name stands: `end` (`[SOS][ctx][name].`), `middle`
            (`[SOS][ctx/2][name][ctx/2].`) or `front` (`[SOS][name][ctx].`), as in CoOp (Zhou et
            al., IJCV 2022). `end` takes the fast path.
        class_specific: one context per class instead of a unified one (CoOp's CSC).

    Raises:
        UserError: a class name that does not fit into the text tower's positions.
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
        self.token_ids_CL, self._name_end_C, self.first = _tokenise(
            clip, self.class_names, context_tokens
        )
        self.end_C = _pool_positions(parts, self.token_ids_CL)
        self.fast = (
            position == "end"
            and not class_specific
            and parts.causal
            and parts.pools_at_end
            and parts.plain_blocks
            and len(parts.blocks) > 1
        )
        self.transformer = self._prepare() if self.fast else None

    @property
    def positions(self) -> int:
        """Text positions that go through the tower for one prompt, all classes together."""
        if self.transformer is not None:
            return self.transformer.layout.rows
        return self.token_ids_CL.numel()

    def __call__(
        self, context: Tensor, deep: Tensor | None = None, *, adapt: Adapt | None = None
    ) -> Tensor:
        """Class features (..., C, D), not normalised.

        Args:
            context: (..., M, d), or (..., C, M, d) when `class_specific`.
            deep: optional (..., J, M, d); entry j replaces the context positions at the input of
                layer j + 1 (deep text prompts as in MaPLe; Khattak et al., CVPR 2023).
            adapt: adds to the output of blocks, on the plain path. It may give a context of one
                client (1, M, d) several: then the features are (K, C, D).
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
            return self._adapted(context_N, deep_N, adapt)
        self.clip.positions_encoded += context_N.shape[0] * self.positions
        if self.fast:
            features_NCD = self._fast(context_N, deep_N)
        else:
            with self.clip.autocast():
                features_NCD = self._plain(context_N, deep_N)
        return features_NCD.float().reshape(*lead, *features_NCD.shape[-2:])

    @torch.no_grad()
    def _prepare(self) -> PromptTransformer:
        parts, ids = self.clip.text, self.token_ids_CL
        start, device = self.first + self.context_tokens, self.clip.device
        suffixes = [
            row[start : end + 1].tolist() for row, end in zip(ids, self.end_C.tolist(), strict=True)
        ]
        packing = pack(suffixes, start, parts.width)
        embedding, position_Ld = parts.token_embedding, parts.positional_embedding_Ld
        suffix_BSd = embedding(packing.token_BS.to(device))
        suffix_BSd = suffix_BSd + position_Ld[start + packing.depth_BS.to(device)]
        before_Fd = embedding(ids[0, : self.first].to(device)) + position_Ld[: self.first]
        return PromptTransformer(
            self.clip.text_layers,
            packing,
            suffix_BSd.float(),
            before_Fd.float(),
            self.context_tokens,
            parts.heads,
        )

    def _fast(self, context_NMd: Tensor, deep_NJMd: Tensor | None) -> Tensor:
        parts = self.clip.text
        positions_Md = parts.positional_embedding_Ld[self.first :][: self.context_tokens]
        assert self.transformer is not None
        hidden_NCd = self.transformer(context_NMd.float() + positions_Md, deep_NJMd)
        return _project(parts, parts.ln_final(hidden_NCd))

    # The plain path: any class position, class-specific contexts, adapters, towers not causal

    def _adapted(self, context_N: Tensor, deep_NJMd: Tensor | None, adapt: Adapt) -> Tensor:
        with self.clip.autocast():
            features_KCD = self._plain(context_N, deep_NJMd, adapt)
        self.clip.positions_encoded += features_KCD.shape[0] * self.token_ids_CL.numel()
        return features_KCD.float()

    def _plain(
        self, context_N: Tensor, deep_NJMd: Tensor | None, adapt: Adapt | None = None
    ) -> Tensor:
        features: list[Tensor] = [torch.empty(0)] * len(self.class_names)
        for end in self.end_C.unique().tolist():
            classes = torch.nonzero(self.end_C == end).flatten()
            block_NGD = self._plain_group(context_N, deep_NJMd, classes, int(end), adapt)
            for i, c in enumerate(classes.tolist()):
                features[c] = block_NGD[:, i]
        return torch.stack(features, dim=1)

    def _plain_group(
        self,
        context_N: Tensor,
        deep_NJMd: Tensor | None,
        classes: Tensor,
        end: int,
        adapt: Adapt | None,
    ) -> Tensor:
        """All positions up to the last one that matters, for classes that end at the same one."""
        parts = self.clip.text
        n, g = context_N.shape[0], len(classes)
        length = end + 1 if parts.causal and parts.pools_at_end else self.token_ids_CL.shape[1]
        x, slots_GM = self.assemble(context_N, classes, length)
        mask = None
        if parts.attn_mask_LL is not None:
            mask = parts.attn_mask_LL[:length, :length].to(x)
        for i, block in enumerate(parts.blocks):
            if deep_NJMd is not None and 0 < i <= deep_NJMd.shape[1]:
                deep = deep_NJMd[:, i - 1, None].expand(n, g, -1, -1).to(x)
                x = _place(x.unflatten(0, (n, g)), slots_GM, deep).flatten(0, 1)
            added = None if adapt is None else adapt(i, block, x.unflatten(0, (n, g)))
            x = block(x, attn_mask=mask)
            if added is not None:
                n = added.shape[0]
                x = (x.unflatten(0, (-1, g)) + added).flatten(0, 1)
        if parts.pools_at_end:
            pooled = x[:, end]
        else:
            pooled = {"first": x[:, 0], "last": x[:, -1]}[parts.pool_type]
            # ln_final works on one position at a time, so pooling first changes nothing.
        features_NGD: Tensor = _project(parts, parts.ln_final(pooled)).unflatten(0, (n, g))
        return features_NGD

    def assemble(self, context_N: Tensor, classes: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Input embeddings (N * G, length, d) and the context slots (G, M) of the given classes."""
        parts, m = self.clip.text, self.context_tokens
        n, g, device = context_N.shape[0], len(classes), self.clip.device
        ids, slots = [], []
        for c in classes.tolist():
            row = self.token_ids_CL[c]
            name_end = int(self._name_end_C[c])
            name, rest = row[self.first + m : name_end], row[name_end:]
            before, x = row[: self.first], row[self.first : self.first + m]
            split = {"end": m, "middle": m // 2, "front": 0}[self.position]
            ids.append(torch.cat([before, x[:split], name, x[split:], rest]))
            left = torch.arange(self.first, self.first + split)
            right = torch.arange(self.first + split + len(name), self.first + m + len(name))
            slots.append(torch.cat([left, right]))
        slots_GM = torch.stack(slots).to(device)
        embedded_GLd = parts.token_embedding(torch.stack(ids)[:, :length].to(device))
        x = embedded_GLd.expand(n, *embedded_GLd.shape)
        if self.class_specific:
            values = context_N[:, classes.to(device)].to(x)
        else:
            values = context_N[:, None].expand(n, g, m, -1).to(x)
        x = _place(x, slots_GM, values) + parts.positional_embedding_Ld[:length]
        return x.flatten(0, 1), slots_GM


def _tokenise(
    clip: FrozenCLIP, class_names: Sequence[str], context_tokens: int
) -> tuple[Tensor, Tensor, int]:
    """Ids (C, L) of `X X ... name.`, where each name ends (C,), and where the context starts."""
    length = clip.text.context_length
    lead = " ".join([PLACEHOLDER] * context_tokens)
    texts = [f"{lead} {name.replace('_', ' ')}.".strip() for name in class_names]
    roomy = clip.tokenizer(texts, context_length=length + 256)
    ends = _end_of_text(clip.text, roomy)
    for name, end in zip(class_names, ends.tolist(), strict=True):
        if end >= length:
            raise UserError(
                f"class name '{name}' with {context_tokens} context tokens needs {end + 1} text "
                f"positions, but {clip.name} has {length}; shorten the name or the context."
            )
    ids_CL = clip.tokenizer(texts, context_length=length)
    first = _specials_before(clip)
    run = ids_CL[:, first : first + context_tokens]
    if not bool((run == ids_CL[:1, first : first + 1]).all()) and context_tokens:
        raise UserError(
            f"the tokenizer of {clip.name} does not turn '{PLACEHOLDER}' into one token, so "
            "prompts cannot be placed."
        )
    bare = clip.tokenizer([t.removesuffix(".") for t in texts], context_length=length)
    # Some tokenizers (SigLIP's) drop the full stop; then the name ends where the text ends.
    dropped = (bare == ids_CL).all(dim=-1)
    name_end_C = _end_of_text(clip.text, ids_CL) - (~dropped).long()
    return ids_CL, name_end_C, first


def _specials_before(clip: FrozenCLIP) -> int:
    """How many special tokens stand before the text: 1 ([SOS]) in CLIP, 0 in SigLIP."""
    one, two = clip.tokenizer([PLACEHOLDER, f"{PLACEHOLDER} {PLACEHOLDER}"]).tolist()
    differing = next(i for i, (a, b) in enumerate(zip(one, two, strict=True)) if a != b)
    return differing - 1


def _end_of_text(parts: TextParts, ids_CL: Tensor) -> Tensor:
    """Index of the end-of-text token of each row (C,)."""
    if parts.pool_type == "eos":
        assert parts.eos_id is not None
        return ids_CL.eq(parts.eos_id).int().argmax(dim=-1)
    if parts.pool_type == "argmax":
        return ids_CL.argmax(dim=-1)
    # Towers that pool elsewhere (SigLIP) pad with one repeated id; the text ends where it starts.
    padding = ids_CL[:, -1:]
    trailing = (ids_CL == padding).flip(-1).int().cumprod(-1).sum(-1)
    return ids_CL.shape[1] - trailing


def token_count(clip: FrozenCLIP, text: str) -> int:
    """How many tokens `text` has, without the special ones."""
    return int(_end_of_text(clip.text, clip.tokenizer([text]))[0]) - _specials_before(clip)


def _pool_positions(parts: TextParts, ids_CL: Tensor) -> Tensor:
    if parts.pools_at_end:
        return _end_of_text(parts, ids_CL)
    return torch.full((ids_CL.shape[0],), ids_CL.shape[1] - 1)


def _place(x_NGLd: Tensor, slots_GM: Tensor, values_NGMd: Tensor) -> Tensor:
    """`x` with `values` at the context slots, out of place so that gradients flow."""
    index = slots_GM[None, :, :, None].expand_as(values_NGMd)
    return x_NGLd.scatter(2, index, values_NGMd)


def _project(parts: TextParts, x: Tensor) -> Tensor:
    if parts.projection is None:
        return x
    if isinstance(parts.projection, Tensor):
        return x @ parts.projection
    projected: Tensor = parts.projection(x)
    return projected


def context_init(clip: FrozenCLIP, text: str | None, context_tokens: int, draw: Tensor) -> Tensor:
    """Initial context (M, d): the embeddings of `text`, or the given normal `draw` (M, d).

    Raises:
        UserError: `text` has another number of tokens than `context_tokens`.
    """
    if not text:
        return draw
    ids = clip.tokenizer([text])
    first = _specials_before(clip)
    end = int(_end_of_text(clip.text, ids)[0])
    if end - first != context_tokens:
        raise UserError(
            f"context_init '{text}' has {end - first} tokens, but context_tokens is "
            f"{context_tokens}; make them equal."
        )
    with torch.no_grad():
        embedded: Tensor = clip.text.token_embedding(ids[0, first:end].to(clip.device))
    return embedded.detach().float().cpu()
