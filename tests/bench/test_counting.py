"""Counted operations: right by hand, whichever kernels PyTorch picks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedprompt.bench.counting import FUSED_ATTENTION, count_gflop

B, H, T, S, E = 2, 4, 50, 70, 16
"""Batch, heads, queries, keys and the width of a head."""
PRODUCT = 2 * B * H * T * S * E / 1e9
"""GFLOP of one product of queries and keys, or of shares and values."""


def test_a_linear_layer_counts_two_operations_per_weight_and_row() -> None:
    layer = nn.Linear(20, 30)
    x = torch.randn(7, 20)
    assert count_gflop(lambda: layer(x)) == pytest.approx(2 * 7 * 20 * 30 / 1e9)
    # Backward to the weights only: one more product.
    assert count_gflop(lambda: layer(x).sum().backward()) == pytest.approx(4 * 7 * 20 * 30 / 1e9)


def test_custom_functions_and_their_backward_passes_are_counted() -> None:
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(w)
            out = x.new_empty(len(x), w.shape[1])
            return torch.mm(x, w, out=out)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
            return gradient @ ctx.saved_tensors[0].T, None

    x, w = torch.randn(7, 20, requires_grad=True), torch.randn(20, 30)
    gflop = count_gflop(lambda: Product.apply(x, w).sum().backward())
    assert gflop == pytest.approx(4 * 7 * 20 * 30 / 1e9)


def test_multi_head_attention_counts_its_projections_and_its_products() -> None:
    width = H * E
    x = torch.randn(B, T, width)
    attention = nn.MultiheadAttention(width, H, batch_first=True).eval().requires_grad_(False)
    projections, products = 4 * 2 * B * T * width * width, 2 * 2 * B * T * T * width
    with torch.no_grad():
        gflop = count_gflop(lambda: attention(x, x, x, need_weights=False))
    assert gflop == pytest.approx((projections + products) / 1e9)
    assert torch.backends.mha.get_fastpath_enabled(), "only the count itself avoids the fast path"


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("plain", {}),
        ("additive mask", {"attn_mask": torch.randn(T, S)}),
        ("boolean mask", {"attn_mask": torch.ones(T, S, dtype=torch.bool).tril(5)}),
        ("shared heads", {"enable_gqa": True}),
        ("one batch of keys", {}),
    ],
)
def test_attention_counts_every_query_with_every_key(
    kind: str, options: dict[str, Any], fused: bool
) -> None:
    batch, heads = {"shared heads": (B, 2), "one batch of keys": (1, H)}.get(kind, (B, H))
    q, k, v = (
        torch.randn(B, H, T, E),
        torch.randn(batch, heads, S, E),
        torch.randn(batch, heads, S, E),
    )

    def attend() -> None:
        F.scaled_dot_product_attention(q, k, v, **options)

    if fused:
        assert count_gflop(attend) == pytest.approx(2 * PRODUCT)
    else:
        with sdpa_kernel(SDPBackend.MATH):
            assert count_gflop(attend) == pytest.approx(2 * PRODUCT)


def test_the_backward_pass_of_fused_attention_counts_the_scores_once_more() -> None:
    q, k, v = (torch.randn(B, H, n, E, requires_grad=True) for n in (T, S, S))

    def step() -> None:
        F.scaled_dot_product_attention(q, k, v).sum().backward()

    # Forward 2; backward 5: the scores, and the gradients of shares, queries, keys and values.
    assert count_gflop(step) == pytest.approx(7 * PRODUCT)
    with sdpa_kernel(SDPBackend.MATH):
        assert count_gflop(step) == pytest.approx(6 * PRODUCT), "here the scores are kept"


def test_no_fused_kernel_of_this_pytorch_is_forgotten() -> None:
    """A kernel without a formula would count nothing, silently."""
    prefix = "aten::_scaled_dot_product_"
    kernels = {
        schema.name.removeprefix("aten::").partition(".")[0].removesuffix("_backward")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith(prefix) and "attention" in schema.name
    }
    # Not fused: made of ordinary products, except on Apple's devices, which are not supported.
    kernels -= {"_scaled_dot_product_attention_math", "_scaled_dot_product_attention_math_for_mps"}
    assert kernels
    assert kernels <= set(FUSED_ATTENTION)
