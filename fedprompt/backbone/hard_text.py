"""Features of hand-written prompts, without the positions that nobody reads.

`FrozenCLIP` calls it once per class list for the zero-shot features of a data set's templates. The
texts of a template begin alike and are short: their common words are evaluated once, and what
follows is packed, as the suffixes of learned prompts are (`packing.py`), instead of passing each
text through all positions of the tower. `FrozenCLIP.encode_text_raw` is open_clip's own pass, which
`tests/backbone/test_hard_text.py` compares.

Shape suffixes: T texts, L text positions, F common tokens, d text width, D joint embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import torch
from torch import Tensor

from fedprompt.backbone.frozen_layer import FrozenLayer
from fedprompt.backbone.packing import Packing, pack
from fedprompt.backbone.text_parts import TextParts
from fedprompt.backbone.text_transformer import PromptTransformer

TEXTS_AT_ONCE = 1024
"""Largest number of texts in one pass; it bounds the memory."""


@torch.no_grad()
def packed_features(
    parts: TextParts, layers: Sequence[FrozenLayer], ids_TL: Tensor, ends_T: Tensor
) -> tuple[Tensor, int]:
    """Encode token ids.

    Args:
        parts: a tower that can be packed (`TextParts.packable`).
        layers: its layers.
        ids_TL: token ids, padded.
        ends_T: positions of the end-of-text tokens.

    Returns:
        Features (T, D), not normalised, and the number of positions that were computed.
    """
    features, positions = [], 0
    pairs = zip(ids_TL.split(TEXTS_AT_ONCE), ends_T.split(TEXTS_AT_ONCE), strict=True)
    for some_TL, some_ends_T in pairs:
        texts = [
            row[: end + 1] for row, end in zip(some_TL.tolist(), some_ends_T.tolist(), strict=True)
        ]
        transformer, common = _transformer(parts, layers, texts)
        nothing_10d = parts.positional_embedding_Ld.new_zeros(1, 0, parts.width)
        hidden_Td = transformer(nothing_10d, None)[0]
        features.append(parts.project(parts.ln_final(hidden_Td)).float())
        positions += common + transformer.layout.rows
    return torch.cat(features), positions


def _transformer(
    parts: TextParts, layers: Sequence[FrozenLayer], texts: Sequence[list[int]]
) -> tuple[PromptTransformer, int]:
    """A transformer over what follows the common tokens of some texts, and the number of these."""
    packing, suffix_BSd, before_Fd = packed_texts(parts, texts)
    transformer = PromptTransformer(layers, packing, suffix_BSd, before_Fd, 0, parts.heads)
    return transformer, len(before_Fd)


@torch.no_grad()
def packed_texts(
    parts: TextParts, texts: Sequence[list[int]], *, repeats_prefix: bool = False
) -> tuple[Packing, Tensor, Tensor]:
    """Pack what follows the common first tokens of some texts.

    Args:
        parts: a tower that can be packed (`TextParts.packable`).
        texts: token ids up to the end-of-text token.
        repeats_prefix: as in `pack`.

    Returns:
        The packing, its embeddings (B, S, d) and those of the common tokens (F, d), positions
        added, float32.
    """
    # The end-of-text token always follows, so that every text has a suffix.
    alike = takewhile(lambda column: len(set(column)) == 1, zip(*texts, strict=False))
    common = min(len(list(alike)), min(map(len, texts)) - 1)
    embedding, position_Ld = parts.token_embedding, parts.positional_embedding_Ld
    packing = pack([t[common:] for t in texts], common, parts.width, repeats_prefix=repeats_prefix)
    device = position_Ld.device
    suffix_BSd = embedding(packing.token_BS.to(device))
    suffix_BSd = suffix_BSd + position_Ld[common + packing.depth_BS.to(device)]
    before_Fd = embedding(torch.tensor(texts[0][:common], device=device)) + position_Ld[:common]
    return packing, suffix_BSd.float(), before_Fd.float()
