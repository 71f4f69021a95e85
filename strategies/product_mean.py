"""Product mean: the exact mean of the clients' low-rank additions B A, factorised again.

For methods that upload pairs of factors, `<name>.lora_A` (..., r, i) and `<name>.lora_B`
(..., o, r). The mean of the factors is not a factor of the mean, since mean(B) mean(A) also
contains the products of B of one client and A of another. Here, with w_k the clients' weights,

    M = sum_k w_k B_k A_k = U S V^T,     B <- U_r S_r,   A <- V_r^T

which is the best approximation of M of rank r (Eckart and Young, 1936). It is exact if the ranks of
all clients together are at most r, or r is the smaller side of M; otherwise `product_error` in
`metrics.jsonl` says what is lost: |M - B A| / |M|, Frobenius norms over all pairs of the round.
All other tensors are averaged as in FedAvg.

Sources: the bias is named by FFA-LoRA (Sun et al., ICLR 2024, arXiv 2403.12313); averaging the
products and factorising by an SVD is how FlexLoRA does it (Bai et al., NeurIPS 2024, arXiv
2402.11505). How we differ: there U S^(1/2) and S^(1/2) V^T are sent. With S in B alone the rows of
A have length 1 even where S is 0, so a direction that no client uses yet can still be learned.

M itself is never formed: two thin QR decompositions reduce it to a core of all ranks together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedprompt.config.fields import option
from fedprompt.errors import UserError
from fedprompt.federation.screening import Update
from fedprompt.messages import Arrays

from .fedavg import FedAvg, FedAvgConfig, weighted_mean

A, B = ".lora_A", ".lora_B"

Array = NDArray[np.float64]


@dataclass(frozen=True)
class ProductMeanConfig(FedAvgConfig):
    """How clients are weighted."""

    name: str = option("product_mean", "strategy name")


class ProductMean(FedAvg):
    """`B A <- the best approximation of sum_k (n_k / n) B_k A_k`.

    Raises:
        UserError: the method uploads tensors, but no pair of factors.
    """

    name = "product_mean"
    Config = ProductMeanConfig

    def __init__(self, config: Any, *, shapes: Mapping[str, tuple[int, ...]], **rest: Any) -> None:
        self.pairs = sorted(
            n.removesuffix(A) for n in shapes if n.endswith(A) and n.removesuffix(A) + B in shapes
        )
        if shapes and not self.pairs:
            raise UserError(
                "strategy product_mean needs pairs of shared factors, '<name>.lora_A' and "
                "'<name>.lora_B', as method=lora has with method.sharing=both or dual."
            )
        self.error = 0.0
        super().__init__(config, shapes=shapes, **rest)

    def aggregate(self, server_round: int, shared: Arrays, updates: list[Update]) -> Arrays:
        """The factors of the mean products, and the mean of everything else, float32."""
        weights = self.weights(updates)
        shares = np.array(weights, dtype=np.float64) / sum(weights)
        new = weighted_mean(shared, updates, weights)
        lost = total = 0.0
        for name in self.pairs:
            a, b, s = factorised(
                [u.arrays[name + A].astype(np.float64) for u in updates],
                [w * u.arrays[name + B] for w, u in zip(shares, updates, strict=True)],
            )
            rank = a.shape[-2]
            total += float(np.square(s).sum())
            lost += float(np.square(s[..., rank:]).sum())
            new |= {name + A: a.astype(np.float32), name + B: b.astype(np.float32)}
        self.error = math.sqrt(lost / total) if total else 0.0
        return new

    def metrics(self) -> dict[str, Any]:
        """`product_error`, the share of the mean that rank r does not hold."""
        return {"product_error": self.error}

    def forget_round(self) -> None:
        """Nothing was lost in a mean."""
        self.error = 0.0


def factorised(
    factors_a: Sequence[Array], factors_b: Sequence[Array]
) -> tuple[Array, Array, Array]:
    """The best factors of a sum of products.

    Args:
        factors_a: (..., r, i) each.
        factors_b: (..., o, r) each.

    Returns:
        A (..., r, i) with orthonormal rows, B (..., o, r), and all singular values of the sum,
        descending.
    """
    rank = factors_a[0].shape[-2]
    stacked_a, stacked_b = np.concatenate(factors_a, axis=-2), np.concatenate(factors_b, axis=-1)
    base_b, core_b = np.linalg.qr(stacked_b)
    base_a, core_a = np.linalg.qr(np.swapaxes(stacked_a, -1, -2))
    u, s, v = np.linalg.svd(core_b @ np.swapaxes(core_a, -1, -2), full_matrices=False)
    a = (v @ np.swapaxes(base_a, -1, -2))[..., :rank, :]
    b = (base_b @ (u * s[..., None, :]))[..., :rank]
    # The signs of an SVD are arbitrary; these do not depend on the order of clients.
    largest = np.take_along_axis(a, np.abs(a).argmax(-1, keepdims=True), axis=-1)
    signs = np.where(largest < 0, -1.0, 1.0)
    a, b = a * signs, b * np.swapaxes(signs, -1, -2)
    # A rank above the sides of the product has more factors than there are directions.
    spare = [(0, 0)] * (a.ndim - 2)
    missing = rank - a.shape[-2]
    a = np.pad(a, [*spare, (0, missing), (0, 0)])
    return a, np.pad(b, [*spare, (0, 0), (0, missing)]), s
