"""A memory of a client's own training images: features by class, and how it votes.

Tip-Adapter and pFedPrompt fill it on the client before its first round and read it in `logits`.

Source: Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification (Zhang et al., ECCV
2022, arXiv 2111.03930; public code: gaopengcuhk/Tip-Adapter). With keys k_cs, the L2-normalised
features of S images of class c, an image v gets for class c

    memory_c(v) = sum_s exp(-beta (1 - v . k_cs))

which is the paper's exp(-beta (1 - v F^T)) times one-hot labels. The keys are features of raw
images, so a memory is private: nothing of it leaves the client.

A memory holds the images that the client has, one row each. Clients differ in their number; in a
block of clients, rows of zeros stand behind the shorter memories (`methods.batch.stack`).

Suffixes: K clients, B images of a batch, N images of a client (of the memory in `recall`), C
classes, S remembered images of a class at most, D joint embedding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.methods.base import ClientData, Tensors
from fedprompt.methods.parts.adapters import raw_features
from fedprompt.rng import generator


def empty_memory(width: int) -> Tensors:
    """An empty memory, as private tensors without a client axis.

    Args:
        width: D.

    Returns:
        `keys` (0, D), and `owners` (0,), which is 1 + the class of a key's image.
    """
    return {"keys": torch.zeros(0, width), "owners": torch.zeros(0)}


def fill_memory(memory: Tensors, data: ClientData, slots: int, seed: int) -> Tensors:
    """Fill a memory with up to S training images of each class, drawn at random if there are more.

    If images have augmented views, a key is the normalised mean of the views' features, as in the
    public code; otherwise it is the feature of the image itself.

    Args:
        memory: the result of `empty_memory`; other tensors in it are passed through.
        data: the client's training images.
        slots: S.
        seed: seed of the run; with the client's id it keys the draw.

    Returns:
        New tensors: `keys` (N, D) and `owners` (N,), by class, and the other tensors of `memory`.
    """
    features_ND, labels_N = _keys(data), data.labels_N.cpu()
    order = torch.from_numpy(generator(seed, "memory", data.client).permutation(len(data)))
    rows = torch.cat([order[labels_N[order] == c][:slots] for c in labels_N.unique()])
    # Private tensors are float32. A class is counted from 1, so that padding is of no class.
    return {**memory, "keys": features_ND[rows], "owners": (labels_N[rows] + 1).float()}


def recall(
    features_KBD: Tensor, keys_KND: Tensor, owners_KN: Tensor, beta: float, classes: int
) -> Tensor:
    """The memory's votes, memory_c(v) of the module's docstring.

    Args:
        features_KBD: L2-normalised image features.
        keys_KND: keys of the memory.
        owners_KN: 1 + the class of each key; 0 where there is none.
        beta: sharpness.
        classes: C.

    Returns:
        Votes (K, B, C), not negative.
    """
    return vote(features_KBD @ keys_KND.transpose(-1, -2), owners_KN, beta, classes)


def vote(affinity_KBN: Tensor, owners_KN: Tensor, beta: float, classes: int) -> Tensor:
    """The votes (K, B, C) of a memory's rows for their classes.

    Args:
        affinity_KBN: how near each image is to each row; 1 gives a whole vote.
        owners_KN: 1 + the class of each row; 0 where there is none.
        beta: sharpness.
        classes: C.
    """
    votes_KBN = (-beta * (1 - affinity_KBN)).exp()
    # A product with one-hot owners adds in a fixed order on a GPU as well, which a scatter does
    # not. Its first column takes the votes of padding: a zero key votes exp(-beta).
    one_hot_KNC = F.one_hot(owners_KN.long(), classes + 1)[..., 1:].to(votes_KBN)
    votes_KBC: Tensor = votes_KBN @ one_hot_KNC
    return votes_KBC


def _keys(data: ClientData) -> Tensor:
    """One L2-normalised feature per image (N, D), on the CPU."""
    if data.views == 1:
        return data.inputs.features.cpu()
    views = raw_features(data.inputs).cpu().unflatten(0, (data.views, len(data)))
    # View 0 is the image without augmentation, which is not part of the mean.
    return F.normalize(views[1:].mean(0), dim=-1)
