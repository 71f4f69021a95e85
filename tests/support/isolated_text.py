"""The plain counterpart of `IsolatedText`: open_clip's own blocks over all positions of each text.

Suffixes: L text positions, M context tokens, d text width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP


def isolated_features(
    clip: FrozenCLIP, texts: Sequence[str], context_Md: Tensor, bias: float
) -> Tensor:
    """Features (C, D), not normalised, of the texts with the context after [SOS]."""
    model, tokens = clip.model, len(context_Md)
    placed = [f"{'X ' * tokens}{text}" for text in texts]
    features = []
    for ids_L in clip.tokenizer(placed):
        end = int(ids_L.argmax())
        x_Ld = model.token_embedding(ids_L).clone()
        x_Ld[1 : 1 + tokens] = context_Md
        x_1Ld = (x_Ld + model.positional_embedding)[None]
        mask_LL = mask(len(ids_L), tokens, end, bias)
        for block in model.transformer.resblocks:
            x_1Ld = block(x_1Ld, attn_mask=mask_LL)
        features.append(model.ln_final(x_1Ld)[0, end] @ model.text_projection)
    return torch.stack(features)


def mask(length: int, tokens: int, end: int, bias: float) -> Tensor:
    """What is added to the score with which position i reads position j."""
    added = torch.full((length, length), -math.inf)
    context = range(1, 1 + tokens)
    for i in range(length):
        for j in range(length):
            if i == end and j <= end:
                added[i, j] = bias if j > tokens else 0.0
            elif i in context:
                added[i, j] = 0.0 if j <= end and j not in context else -math.inf
            elif j <= i and j not in context:
                added[i, j] = 0.0
    return added
