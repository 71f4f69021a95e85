"""A memory of a client's own training images: features by class, and how it votes.

Tip-Adapter and pFedPrompt fill it on the client before its first round and read it in `logits`.

Source: Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification (Zhang et al., ECCV
2022, arXiv 2111.03930; public code: gaopengcuhk/Tip-Adapter). With keys k_cs, the L2-normalised
features of S images of class c, an image v gets for class c

    memory_c(v) = sum_s exp(-beta (1 - v . k_cs))

which is the paper's exp(-beta (1 - v F^T)) times one-hot labels. The keys are features of raw
images, so a memory is private: nothing of it leaves the client.

Suffixes: K clients, B images of a batch, N images of a client, C classes, S slots per class, D
joint embedding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.methods.base import ClientData, Tensors
from fedprompt.methods.parts.adapters import raw_features
from fedprompt.rng import generator


def empty_memory(classes: int, slots: int, width: int) -> Tensors:
    """An empty memory, as private tensors without a client axis.

    Args:
        classes: C.
        slots: S, the largest number of images of one class.
        width: D.

    Returns:
        `keys` (C, S, D), and `filled` (C, S), which is 1 where a slot holds an image; all zero.
    """
    return {"keys": torch.zeros(classes, slots, width), "filled": torch.zeros(classes, slots)}


def fill_memory(memory: Tensors, data: ClientData, seed: int) -> Tensors:
    """Fill a memory with up to S training images of each class, drawn at random if there are more.

    If images have augmented views, a key is the normalised mean of the views' features, as in the
    public code; otherwise it is the feature of the image itself.

    Args:
        memory: the result of `empty_memory`; other tensors in it are passed through.
        data: the client's training images.
        seed: seed of the run; with the client's id it keys the draw.

    Returns:
        New tensors with the names and shapes of `memory`.
    """
    classes, slots, _ = memory["keys"].shape
    # Members of a method are pure, so the given tensors are not filled in place.
    keys_CSD, filled_CS = memory["keys"].clone(), memory["filled"].clone()
    features_ND, labels_N = _keys(data), data.labels_N.cpu()
    order = torch.from_numpy(generator(seed, "memory", data.client).permutation(len(data)))
    for c in range(classes):
        rows = order[labels_N[order] == c][:slots]
        keys_CSD[c, : len(rows)] = features_ND[rows]
        filled_CS[c, : len(rows)] = 1.0
    return {**memory, "keys": keys_CSD, "filled": filled_CS}


def recall(features_KBD: Tensor, keys_KCSD: Tensor, filled_KCS: Tensor, beta: float) -> Tensor:
    """The memory's votes, memory_c(v) of the module's docstring.

    Args:
        features_KBD: L2-normalised image features.
        keys_KCSD: keys of the memory.
        filled_KCS: 1 where a slot holds an image.
        beta: sharpness.

    Returns:
        Votes (K, B, C), not negative.
    """
    affinity = features_KBD @ keys_KCSD.flatten(1, 2).transpose(-1, -2)
    # The zero key of an empty slot would still vote exp(-beta).
    votes = (-beta * (1 - affinity)).exp() * filled_KCS.flatten(1, 2)[:, None]
    votes_KBC: Tensor = votes.unflatten(-1, tuple(filled_KCS.shape[1:])).sum(-1)
    return votes_KBC


def _keys(data: ClientData) -> Tensor:
    """One L2-normalised feature per image (N, D), on the CPU."""
    if data.views == 1:
        return data.inputs.features.cpu()
    views = raw_features(data.inputs).cpu().unflatten(0, (data.views, len(data)))
    # View 0 is the image without augmentation, which is not part of the mean.
    return F.normalize(views[1:].mean(0), dim=-1)
