"""Layers of K clients at once are torch's own layers, one client after the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fedprompt.methods.parts.linear import layer_norm, linear, linear_start


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("middle", [(), (5,), (5, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_each_clients_own(middle: tuple[int, ...], bias: bool) -> None:
    x, weight, shift = draw(3, *middle, 6), draw(3, 2, 6), draw(3, 2) if bias else None
    ours = linear(x, weight, shift)
    assert ours.shape == (3, *middle, 2)
    for k in range(3):
        layer = nn.Linear(6, 2, bias=bias)
        layer.weight.data = weight[k]
        if shift is not None:
            layer.bias.data = shift[k]
        assert torch.allclose(ours[k], layer(x[k]), atol=1e-5)


def test_a_client_axis_of_one_broadcasts_on_either_side() -> None:
    x, weight, bias = draw(3, 5, 6), draw(3, 2, 6), draw(3, 2)
    one_model = linear(x, weight[:1], bias[:1])
    one_input = linear(x[:1], weight, bias)
    for k in range(3):
        assert torch.allclose(one_model[k], x[k] @ weight[0].T + bias[0], atol=1e-5)
        assert torch.allclose(one_input[k], x[0] @ weight[k].T + bias[k], atol=1e-5)


@pytest.mark.parametrize("middle", [(), (5,), (5, 4)])
def test_layer_norm_is_each_clients_own(middle: tuple[int, ...]) -> None:
    x, weight, bias = draw(3, *middle, 6), draw(3, 6), draw(3, 6) + 1
    ours = layer_norm(x, weight, bias)
    for k in range(3):
        layer = nn.LayerNorm(6)
        layer.weight.data, layer.bias.data = weight[k], bias[k]
        assert torch.allclose(ours[k], layer(x[k]), atol=1e-5)
    assert layer_norm(x, weight[:1], bias[:1]).shape == x.shape


def test_start_has_torchs_range_and_is_keyed() -> None:
    start = linear_start("gate", 40, 25, 7, "init", "shared")
    assert {n: tuple(t.shape) for n, t in start.items()} == {
        "gate.weight": (40, 25),
        "gate.bias": (40,),
    }
    weight = start["gate.weight"]
    assert weight.dtype == torch.float32
    assert 0.19 < float(weight.abs().max()) <= 1 / 5
    assert abs(float(weight.mean())) < 0.02  # 1,000 draws of standard deviation 0.115
    assert float(weight.std()) == pytest.approx(0.2 / 3**0.5, rel=0.06)
    again = linear_start("gate", 40, 25, 7, "init", "shared")
    assert all(torch.equal(t, again[n]) for n, t in start.items())
    for other in (("gate", 8), ("door", 7)):
        changed = linear_start(other[0], 40, 25, other[1], "init", "shared")
        assert not torch.equal(changed[f"{other[0]}.weight"], weight)
    assert list(linear_start("gate", 4, 4, 7, bias=False)) == ["gate.weight"]
