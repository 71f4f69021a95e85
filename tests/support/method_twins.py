"""What the twins of several methods are made of: plain text passes, invented images, closeness."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.fields import build
from fedprompt.methods.base import Method, Task, Tensors, stack
from fedprompt.methods.registry import method_class
from tests.support.builders import CLASS_NAMES

TASK = Task(CLASS_NAMES)


def make(clip: FrozenCLIP, name: str, task: Task = TASK, **options: Any) -> Method:
    """A method with the given options."""
    cls = method_class(name)
    return cls(build(cls.Config, {"name": name, **options}, "method"), clip, task)


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Normal draws of a fixed seed."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).float()


def images(clients: int, count: int, width: int, seed: int = 0) -> Tensor:
    """L2-normalised features (K, B, D) that have no structure."""
    return F.normalize(draw(clients, count, width, seed=seed), dim=-1)


def leaves(method: Method, clients: int, spread: float = 0.01) -> tuple[Tensors, Tensors]:
    """Shared and private tensors (K, ...), different for every client, that take gradients."""
    shared = stack([method.init_shared(1)] * clients)
    private = stack([method.init_private(1, k) for k in range(clients)])
    for i, tensors in enumerate((shared, private)):
        for j, (name, value) in enumerate(tensors.items()):
            moved = value + spread * draw(*value.shape, seed=100 * i + j)
            tensors[name] = moved.requires_grad_()
    return shared, private


def text_pass(clip: FrozenCLIP, embedded_CLd: Tensor, ids_CL: Tensor) -> Tensor:
    """L2-normalised features (C, D) of token embeddings, over all 77 positions."""
    model = clip.model
    x = embedded_CLd + model.positional_embedding
    x = model.transformer(x, attn_mask=model.attn_mask)
    x = model.ln_final(x)[torch.arange(len(ids_CL)), ids_CL.argmax(dim=-1)]
    return F.normalize(x @ model.text_projection, dim=-1)


def prompted(clip: FrozenCLIP, context_Md: Tensor, names: Sequence[str] = CLASS_NAMES) -> Tensor:
    """Features (C, D) of `[SOS][context][name].`, written as CoOp's code assembles them."""
    m = len(context_Md)
    ids = clip.tokenizer([" ".join(["X"] * m) + f" {name}." for name in names])
    embedded = clip.model.token_embedding(ids)
    context = context_Md.expand(len(ids), -1, -1)
    return text_pass(clip, torch.cat([embedded[:, :1], context, embedded[:, 1 + m :]], 1), ids)


def assert_close(ours: Tensor, theirs: Tensor, rtol: float = 1e-4) -> None:
    """The largest difference is at most `rtol` of the largest value."""
    assert ours.shape == theirs.shape
    largest = float(theirs.detach().abs().max())
    assert largest > 0
    assert float((ours - theirs).detach().abs().max()) <= rtol * largest
