"""Composition of a shared and a private prompt by cross-attention; FedRSCLIP and FedPGP offer it.

Source of the idea: PIP, in which a basic and a degradation prompt of image restoration interact by
cross-attention. This form of it is ours.

Suffixes: M shared tokens, N private tokens, w width.
"""

from __future__ import annotations

import math

from torch import Tensor


def attended(shared: Tensor, private: Tensor) -> Tensor:
    """p = S + softmax(S P^T / sqrt(w)) P: every shared token adds some of the private ones.

    Args:
        shared: S (..., M, w); leading axes of 1 broadcast on either side.
        private: P (..., N, w), as many tokens as one likes.

    Returns:
        p (..., M, w), as long as S.
    """
    share_MN = (shared @ private.transpose(-1, -2) / math.sqrt(shared.shape[-1])).softmax(-1)
    return shared + share_MN @ private
