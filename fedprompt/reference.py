"""Slow, plain twins of the fast paths: the usual way of doing it, for tests and benchmarks."""

from __future__ import annotations

import torch
from open_clip.transformer import text_global_pool
from torch import Tensor

from fedprompt.text_tower import TextTower, _project


def reference_class_features(
    tower: TextTower, context: Tensor, deep: Tensor | None = None
) -> Tensor:
    """What `tower(context, deep)` computes, over all positions and one prompt at a time.

    This is the pass of CoOp's public code: every class's full sequence of (usually 77) positions
    goes through the model's own transformer blocks, and open_clip's own pooling reads the feature.
    Shapes as in `TextTower.__call__`.
    """
    parts = tower.clip.text
    tail = 3 if tower.class_specific else 2
    lead = context.shape[:-tail]
    classes = torch.arange(len(tower.class_names))
    length = tower.token_ids_CL.shape[1]
    features = []
    flat_deep = None if deep is None else deep.reshape(-1, *deep.shape[-3:])
    for i, one in enumerate(context.reshape(-1, *context.shape[-tail:])):
        x, slots_CM = tower.assemble(one[None], classes, length)
        mask = parts.attn_mask_LL
        for layer, block in enumerate(parts.blocks):
            if flat_deep is not None and 0 < layer <= flat_deep.shape[1]:
                x = x.clone()
                for c in classes.tolist():
                    x[c, slots_CM[c]] = flat_deep[i, layer - 1]
            x = block(x, attn_mask=mask)
        x = parts.ln_final(x)
        pooled = text_global_pool(
            x, tower.token_ids_CL.to(x.device), parts.pool_type, eos_token_id=parts.eos_id
        )
        features.append(_project(parts, pooled))
    return torch.stack(features).reshape(*lead, *features[0].shape)
