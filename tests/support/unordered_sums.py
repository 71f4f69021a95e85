"""Finds the operations of a CPU run whose result would depend on the order of threads on a GPU.

CUDA adds the rows of equal indices in whichever order its threads arrive. That is visible in the
last bits as soon as two of them are not zero. The fused kernels of attention do the same in their
backward pass. Which operations are concerned is documented with PyTorch's
`use_deterministic_algorithms`, which also refuses some of them.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_REFUSED = re.compile(
    "adaptive_|avg_pool3d|max_unpool|fractional_max|upsample_.*_backward|reflection_pad.*_backward"
    "|nll_loss2d|ctc_loss|embedding_bag|^put_?$|histc|kthvalue|median|grid_sampler.*_backward"
)
"""Operations that deterministic mode refuses on CUDA."""


class UnorderedSums(TorchDispatchMode):
    """Records, while it is active, the operations without a fixed order of their sums.

    Attributes:
        unordered: names of operations whose sums have several terms that are not zero.
        refused: names of operations that deterministic mode would refuse.
        fused_attention: how many backward passes went through a fused attention kernel.
    """

    def __init__(self) -> None:
        super().__init__()
        self.unordered: set[str] = set()
        self.refused: set[str] = set()
        self.fused_attention = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if _REFUSED.search(name):
            self.refused.add(name)
        if name.startswith("_scaled_dot_product_") and name.endswith("_backward"):
            self.fused_attention += 1
        if _most_terms(name, args, kwargs or {}) > 1:
            self.unordered.add(name)
        return func(*args, **(kwargs or {}))


def _most_terms(name: str, args: Any, kwargs: Any) -> float:
    """The largest number of terms, zeros not counted, that an operation adds to one element."""
    if name in ("scatter_add", "scatter_add_", "index_add", "index_add_"):
        target, dim, index, source = args[:4]
        counts = torch.zeros(target.shape)
        add = counts.scatter_add if name.startswith("scatter") else counts.index_add
        return float(add(dim, index, (source != 0).float()).max())
    accumulate = args[3] if len(args) > 3 else kwargs.get("accumulate", False)
    if name in ("index_put", "index_put_", "_index_put_impl_") and accumulate:
        target, indices, values = args[:3]
        # Not the method of `Tensor`, which accepts no None for dimensions that are kept whole.
        terms: Tensor = torch.ops.aten.index_put(
            torch.zeros(target.shape), indices, (values != 0).float(), True
        )
        return float(terms.max())
    if name in ("index_reduce", "scatter_reduce", "bincount") and len(args) > 1:
        return float("inf") if args[1] is not None else 0
    return 0
