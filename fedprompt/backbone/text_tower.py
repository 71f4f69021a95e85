"""Text prompts -> class features, exactly and fast.

Methods call `TextTower` in every training step and evaluation. CLIP's text attention is causal, so
(1) nothing after the end-of-text token matters, (2) the hidden states of `[SOS][context]` do not
depend on the class name that follows, and (3) class names that begin alike have equal hidden states
up to where they differ. The fast path computes the prefix once per prompt, lets the packed suffix
tokens (`packing.py`) attend to it, and evaluates the last layer at the end-of-text positions only
(`text_transformer.py`). The result is that of the usual pass over all positions:
`fedprompt/bench/reference.py` contains that pass, and `tests/backbone/test_text_tower.py` compares
values and gradients of the two.

The plain path runs open_clip's own blocks. It serves other positions of the class name,
class-specific contexts, adapters, and towers that are not causal.

Shape suffixes: N prompts (all leading dimensions flattened), M context tokens, C classes, G classes
of a group, L text positions, d text width, D joint embedding, J deep layers, F special tokens
before the context, B bins of S suffix slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.packing import pack
from fedprompt.backbone.text_tokens import tokenise
from fedprompt.backbone.text_transformer import PromptTransformer
from fedprompt.errors import UserError

ClassPosition = Literal["end", "middle", "front"]
Adapt = Callable[[int, Any, Tensor], Tensor | None]
"""From a layer's number, its block and its input (N, G, L, d) to what is added to its output, or
None. Where N is 1 in the input, it may be larger in the result."""


class TextTower:
    """Class features of learned prompts for one class list and one number of context tokens.

    Args:
        clip: the frozen backbone.
        class_names: C class names. They are never shared or aggregated; every class list gets a
            tower of its own.
        context_tokens: M learned tokens.
        position: where the class name stands: `end` (`[SOS][ctx][name].`), `middle`
            (`[SOS][ctx/2][name][ctx/2].`) or `front` (`[SOS][name][ctx].`), as in CoOp (Zhou et
            al., IJCV 2022). `end` takes the fast path.
        class_specific: one context per class instead of a unified one (CoOp's CSC).

    Attributes:
        fast: whether calls without `adapt` take the fast path.
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
        self.fast = (
            position == "end"
            and not class_specific
            and parts.causal
            and parts.pools_at_end
            and parts.plain_blocks
            # With one layer, the first would be the last as well.
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
        """Class features of prompts.

        Args:
            context: (..., M, d), or (..., C, M, d) when `class_specific`.
            deep: (..., J, M, d); entry j replaces the context positions at the input of layer
                j + 1 (deep text prompts as in MaPLe; Khattak et al., CVPR 2023).
            adapt: adds to the output of blocks, on the plain path. It may turn the context of one
                client (1, M, d) into several: then the features are (K, C, D).

        Returns:
            (..., C, D), float32, not normalised.

        Raises:
            UserError: there are deep prompts for more layers than follow the first.
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
        # The fast path runs in its layers' dtype and needs no autocast.
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
            row[start : end + 1].tolist()
            for row, end in zip(ids, self._tokens.pooled_C.tolist(), strict=True)
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
        return parts.project(parts.ln_final(hidden_NCd))

    # The plain path

    def _adapted(self, context_N: Tensor, deep_NJMd: Tensor | None, adapt: Adapt) -> Tensor:
        with self.clip.autocast():
            features_KCD = self._plain(context_N, deep_NJMd, adapt)
        self.clip.positions_encoded += features_KCD.shape[0] * self.token_ids_CL.numel()
        return features_KCD.float()

    def _plain(
        self, context_N: Tensor, deep_NJMd: Tensor | None, adapt: Adapt | None = None
    ) -> Tensor:
        # One pass per position of the end of the text: padding all classes to the longest name
        # would waste most of the work.
        features: list[Tensor] = [torch.empty(0)] * len(self.class_names)
        for end in self._tokens.pooled_C.unique().tolist():
            classes = torch.nonzero(self._tokens.pooled_C == end).flatten()
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
        """Compute features (N, G, D) of classes whose prompts end at the same position.

        Positions after the end of the text are not computed where attention is causal.
        """
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
                # An adapter may turn the prompts of one client into those of several.
                n = added.shape[0]
                x = (x.unflatten(0, (-1, g)) + added).flatten(0, 1)
        if parts.pools_at_end:
            pooled = x[:, end]
        else:
            pooled = {"first": x[:, 0], "last": x[:, -1]}[parts.pool_type]
        # ln_final works on each position by itself, so it may follow the pooling.
        features_NGD: Tensor = parts.project(parts.ln_final(pooled)).unflatten(0, (n, g))
        return features_NGD

    def assemble(self, context_N: Tensor, classes: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Build the embeddings at the input of the first layer.

        Args:
            context_N: (N, M, d), or (N, C, M, d) when `class_specific`.
            classes: (G,), indices of classes.
            length: positions to assemble, from the first.

        Returns:
            Embeddings with positions (N * G, length, d), and the positions (G, M) of the context.
        """
        parts, m = self.clip.text, self.context_tokens
        n, g, device = context_N.shape[0], len(classes), self.clip.device
        ids, slots = [], []
        for c in classes.tolist():
            row = self.token_ids_CL[c]
            name_end = int(self._tokens.name_end_C[c])
            # The tokens exist in the order of `end`; other positions only rearrange them.
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


def _place(x_NGLd: Tensor, slots_GM: Tensor, values_NGMd: Tensor) -> Tensor:
    """`x` with `values` at the context slots; a copy, because autograd needs the original."""
    index = slots_GM[None, :, :, None].expand_as(values_NGMd)
    return x_NGLd.scatter(2, index, values_NGMd)
