"""What tests of dual-prompt and patch-based methods share: clients, batches, gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import Batch, Method, Tensors, stack
from fedprompt.rng import generator
from tests.support.builders import CLASS_NAMES, batch_of

K, B, P = 3, 5, 4
REAL = (5, 3, 4)  # real images of each client; the rest of its batch is padding


def batch(clip: FrozenCLIP, *, patches: bool = False) -> Batch:
    """Images of K clients; behind the real ones, padding repeats other images, not zeros."""
    draw = generator(0, "prompt twins")

    def vectors(*shape: int) -> Tensor:
        drawn = torch.from_numpy(draw.standard_normal((*shape, clip.embed_dim))).float()
        return F.normalize(drawn, dim=-1)

    labels = torch.from_numpy(draw.integers(0, len(CLASS_NAMES), (K, B)))
    mask = torch.arange(B)[None] < torch.tensor(REAL)[:, None]
    inputs = Inputs(vectors(K, B), vectors(K, B, P) if patches else None)
    return batch_of(inputs, labels, mask)


def one_client(data: Batch, k: int) -> Batch:
    """Client k's real images alone, without padding."""
    rows = (slice(k, k + 1), slice(0, REAL[k]))
    return Batch(data.inputs[rows], data.labels_KB[rows], data.mask_KB[rows], data.round_info, 0)


def tensors(method: Method, noise: float = 0.05) -> tuple[Tensors, Tensors]:
    """Shared and private tensors of K clients, made different; leaves but for the frozen ones."""
    both = (
        stack([method.init_shared(0) for _ in range(K)]),
        stack([method.init_private(0, k) for k in range(K)]) if method.init_private(0, 0) else {},
    )
    for kind, held in zip(("shared", "private"), both, strict=True):
        for n, value in held.items():
            if f"{kind}.{n}" in method.frozen:
                continue
            draw = torch.Generator().manual_seed(len(kind + n))
            held[n] = value + noise * torch.randn(value.shape, generator=draw)
            held[n].requires_grad_()
    return both


def row(held: Tensors, k: int) -> Tensors:
    """Client k's tensors as a block of one, leaves of their own."""
    return {
        n: t.detach()[k : k + 1].clone().requires_grad_(t.requires_grad) for n, t in held.items()
    }


def loss_of(method: Method, shared: Tensors, private: Tensors, data: Batch) -> dict[str, Tensor]:
    return method.loss_terms(shared, private, method.encode(shared, private), data)


def leaves(*held: Tensors) -> list[Tensor]:
    return [t for some in held for t in some.values() if t.requires_grad]


def gradients(loss_terms: dict[str, Tensor], wanted: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(torch.stack(list(loss_terms.values())).sum(), wanted))


def close(ours: Tensor, theirs: Tensor, rtol: float = 1e-4) -> None:
    """Equal within `rtol` of the largest entry, and not both nothing."""
    assert ours.shape == theirs.shape
    scale = float(theirs.detach().abs().max())
    assert scale > 0
    assert float((ours - theirs).detach().abs().max()) <= rtol * scale


def assert_clients_alone_agree(
    method: Method, shared: Tensors, private: Tensors, data: Batch
) -> None:
    """K clients at once, padded, have the terms and gradients of each alone, unpadded."""
    together = loss_of(method, shared, private, data)
    found = gradients(together, leaves(shared, private))
    for k in range(K):
        s, p = row(shared, k), row(private, k)
        alone = loss_of(method, s, p, one_client(data, k))
        assert alone.keys() == together.keys()
        for term, value in alone.items():
            torch.testing.assert_close(together[term][k], value[0], rtol=1e-4, atol=1e-6)
        for ours, theirs in zip(found, gradients(alone, leaves(s, p)), strict=True):
            close(ours[k], theirs[0])
