"""Class features of learned tokens that read the words of a text, which in turn do not read them.

In the usual pass (`text_tower.py`), the words of a class prompt attend to the context before them,
so that learning the context changes them. Here an attention mask isolates them (GPR-NIAM, Qi et
al., 2025). Of `[SOS][context][words][EOT]`

    [SOS] and the words   read [SOS] and the words before them, as in the text without a context
    a context token       reads [SOS], all words and [EOT], but no context token, itself included
    [EOT]                 reads everything; `bias` is added to its scores of the words and of itself

in every layer. So hidden states of [SOS] and the words are constants, whose keys and values are
computed once per class list. What remains for every prompt are M + 1 rows of each class, and in the
last layer one. Autograd records the layers, whose weights need no gradient (`frozen_layer.py`).
`tests/backbone/test_isolated_text.py` compares values and gradients with a pass of open_clip's own
blocks over all positions.

Constants take 8 d bytes per layer and word in float32: 16 MB for 100 classes of six words and
[SOS] in CLIP ViT-B/16.

Shape suffixes: N prompts, M context tokens, C classes, G classes of a chunk, T positions of [SOS]
and the words, R = M + 1 rows of a class, d text width, h heads, e = d / h, D joint embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.frozen_layer import FrozenLayer
from fedprompt.backbone.text_attention import additive, aligned
from fedprompt.backbone.text_sequences import checkpointed, positions_at_once
from fedprompt.backbone.token_rows import end_of_text, specials_before, token_rows
from fedprompt.errors import UserError


class IsolatedText:
    """Features of one list of texts with M learned tokens before each.

    Args:
        clip: the frozen backbone.
        texts: C texts, each with its class name in it.
        context_tokens: M.
        bias: what is added to the scores of the words and of [EOT] itself, read by [EOT].

    Attributes:
        positions: rows that one prompt takes, all classes together.

    Raises:
        UserError: the text tower is of another kind, or a text does not fit into it.
    """

    def __init__(
        self, clip: FrozenCLIP, texts: Sequence[str], context_tokens: int, bias: float
    ) -> None:
        parts = clip.text
        if not parts.packable:
            raise UserError(
                f"backbone: an attention mask within prompts needs a causal text tower of "
                f"open_clip's plain kind, and that of {clip.name} is of another kind; choose "
                "another backbone."
            )
        self.clip, self.tokens = clip, context_tokens
        self._first = specials_before(clip.tokenizer)
        ids_CL = token_rows(clip.tokenizer, parts, texts, clip.name)
        end_C = end_of_text(parts, ids_CL)
        for text, end in zip(texts, end_C.tolist(), strict=True):
            if (needed := end + 1 + context_tokens) > parts.context_length:
                raise UserError(
                    f"the text '{text}' with {context_tokens} context tokens needs {needed} text "
                    f"positions, but {clip.name} has {parts.context_length}; shorten it."
                )
        self.positions = len(texts) * (context_tokens + 1)
        # The context stands after [SOS], and moves the words to later positions.
        place_T = torch.arange(int(end_C.max()))
        place_T[self._first :] += context_tokens
        place_T = place_T.clamp(max=parts.context_length - 1).to(clip.device)
        position_Ld = parts.positional_embedding_Ld
        with torch.no_grad():
            words_CTd = parts.token_embedding(ids_CL[:, : len(place_T)].to(clip.device))
            words_CTd = words_CTd + position_Ld[place_T]
            end_Cd = parts.token_embedding(ids_CL.gather(1, end_C[:, None])[:, 0].to(clip.device))
            end_Cd = end_Cd + position_Ld[(end_C + context_tokens).to(clip.device)]
            self._end_Cd = end_Cd.float()
            self._words = _constant_keys(clip.text_layers, words_CTd.float(), parts.heads)
        clip.positions_encoded += words_CTd.shape[0] * words_CTd.shape[1]
        self._mask = self._mask_of(end_C, bias).to(clip.device, clip.text_layers[0].dtype)

    def __call__(self, context: Tensor) -> Tensor:
        """Features (..., C, D) of contexts (..., M, d), float32, not normalised."""
        lead = context.shape[:-2]
        context_NMd = context.reshape(math.prod(lead), *context.shape[-2:]).float()
        parts, n = self.clip.text, len(context_NMd)
        positions_Md = parts.positional_embedding_Ld[self._first :][: self.tokens]
        context_NMd = context_NMd + positions_Md
        self.clip.positions_encoded += n * self.positions
        most = positions_at_once(self.clip.device, len(parts.blocks), parts.width)
        at_once = max(1, most // (max(1, n) * (self.tokens + 1)))
        count = len(self._end_Cd)
        run = partial(self._chunk, context_NMd)
        # Several chunks are computed again for the gradient, one after the other.
        bounded = run if at_once >= count else partial(checkpointed, run)
        features = [bounded(first, first + at_once) for first in range(0, count, at_once)]
        return torch.cat(features, dim=1).reshape(*lead, count, -1)

    def _chunk(self, context_NMd: Tensor, first: int, last: int) -> Tensor:
        """Features (N, G, D) of the classes `first` .. `last` - 1, or up to the last one."""
        parts, layers, rows = self.clip.text, self.clip.text_layers, self.tokens + 1
        end_Gd = self._end_Cd[first:last]
        n, g = len(context_NMd), len(end_Gd)
        x_NGRd = torch.cat(
            [context_NMd[:, None].expand(-1, g, -1, -1), end_Gd[:, None].expand(n, -1, -1, -1)],
            dim=2,
        )
        x, mask = x_NGRd.flatten(0, 2), aligned(self._mask[first:last].repeat(n, 1, 1, 1))
        for layer, words in zip(layers[:-1], self._words, strict=False):
            q, k, v = self._heads(layer.project(x)[0], rows, 3)
            mixed = self._attend(q, k, v, words[:, first:last], mask)
            x = layer.mlp(layer.add_attention(x, mixed))[0]

        def at_ends(of: Tensor) -> Tensor:
            return of.view(n * g, rows, -1)[:, -1]

        # The last layer is read at [EOT] alone.
        query, kv, _ = layers[-1].project_few(x, at_ends)
        (q,), (k, v) = self._heads(query, 1, 1), self._heads(kv, rows, 2)
        mixed = self._attend(q, k, v, self._words[-1][:, first:last], mask[:, :, -1:])
        hidden_Gd = layers[-1].mlp(layers[-1].add_attention(at_ends(x), mixed))[0]
        features = parts.project(parts.ln_final(hidden_Gd)).float()
        return features.view(n, g, -1)

    def _heads(self, rows: Tensor, length: int, parts: int) -> tuple[Tensor, ...]:
        """Parts such as queries, keys and values, (N * G, h, `length`, e) each, of rows."""
        heads = self.clip.text.heads
        split = rows.view(-1, length, parts, heads, rows.shape[-1] // parts // heads)
        return split.permute(2, 0, 3, 1, 4).unbind(0)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        """Mixed values as rows, with the constant keys and values (2, G, h, T, e) before others."""
        n = len(q) // words.shape[1]
        k, v = (
            torch.cat([constant.repeat(n, 1, 1, 1), own], dim=2)
            for constant, own in zip(words, (k, v), strict=True)
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.transpose(1, 2).flatten(2).flatten(0, 1)

    def _mask_of(self, end_C: Tensor, bias: float) -> Tensor:
        """What is added to the scores, (C, 1, R, T + R), of context tokens and [EOT]."""
        rows, words = self.tokens + 1, int(end_C.max())
        there_CT = torch.arange(words) < end_C[:, None]
        sees_CRR = torch.zeros(len(end_C), rows, rows, dtype=torch.bool)
        sees_CRR[:, :, -1] = True
        sees_CRR[:, -1] = True
        sees = torch.cat([there_CT[:, None].expand(-1, rows, -1), sees_CRR], dim=-1)
        mask = additive(sees)
        mask[:, -1, self._first : words] += bias
        mask[:, -1, -1] += bias
        return mask[:, None]


def _constant_keys(layers: Sequence[FrozenLayer], x_CTd: Tensor, heads: int) -> list[Tensor]:
    """Keys and values (2, C, h, T, e) of [SOS] and the words in every layer, which is causal."""
    count, length, _ = x_CTd.shape
    x, found = x_CTd.flatten(0, 1), []
    for i, layer in enumerate(layers):
        qkv = layer.project(x)[0].view(count, length, 3, heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        found.append(torch.stack([k, v]))
        if i < len(layers) - 1:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = layer.mlp(layer.add_attention(x, out.transpose(1, 2).flatten(2).flatten(0, 1)))[0]
    return found
