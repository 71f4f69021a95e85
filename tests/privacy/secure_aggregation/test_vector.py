"""The vector of a client, its parameters, and the masks over it."""

from __future__ import annotations

import numpy as np
import pytest

from fedprompt.config.protection import SecureAggregationConfig
from fedprompt.errors import UserError
from fedprompt.privacy.secure_aggregation import (
    flower,
)
from fedprompt.privacy.secure_aggregation.masks import mask, stream
from fedprompt.privacy.secure_aggregation.params import MODULUS, Terms
from fedprompt.privacy.secure_aggregation.vector import LARGEST_LOSS, decode, encode


def test_the_vector_and_its_sum_by_hand() -> None:
    received = {"b": np.zeros(1, np.float32), "a": np.ones(2, np.float32)}
    trained = {"b": np.full(1, -3, np.float32), "a": np.array([1.25, 0.5], np.float32)}
    vector, cut = encode(received, trained, weight=0.5, loss=10.0, clip=2.0, levels=2**20)
    # Names in order, w Delta / c with -3 cut to -2; w, cut, w loss / 100.
    np.testing.assert_allclose(
        vector, [0.0625, -0.125, -0.5, 0.5, 1.0, 0.05], rtol=0, atol=1 / 2**20
    )
    assert cut
    assert ((vector * 2**19) % 1 == 0).all(), "multiples of 2 / levels"
    other, cut = encode(received, received, weight=1.0, loss=float("nan"), clip=2.0, levels=2**20)
    assert not cut
    found = decode(vector + other, received, 2.0)
    np.testing.assert_allclose(found.change["a"], [0.125 / 1.5, -0.25 / 1.5], atol=1e-5)
    np.testing.assert_allclose(found.change["b"], [-1 / 1.5], atol=1e-5)
    assert found.loss == pytest.approx((0.5 * 10 + LARGEST_LOSS) / 1.5, abs=1e-3)
    assert found.cut == 1
    broken = {**trained, "b": np.full(1, np.nan, np.float32)}
    with pytest.raises(UserError, match="not finite"):
        encode(received, broken, weight=1.0, loss=0.0, clip=1.0, levels=2**20)


@pytest.mark.parametrize("clients", [3, 4, 10, 100, 1000, 4096])
def test_sums_stay_below_the_modulus(clients: int) -> None:
    terms = Terms.of(SecureAggregationConfig(), clients)
    assert clients * terms.levels < MODULUS
    assert terms.levels == 2**30 or 2 * clients * terms.levels >= MODULUS, "no finer is possible"
    assert 2 * terms.threshold > terms.shares == clients


def test_the_threshold_is_more_than_two_thirds_of_the_shares() -> None:
    for share in (0.6667, 0.7, 0.9, 1.0):
        for clients in range(3, 40):
            terms = Terms.of(SecureAggregationConfig(threshold=share, shares=7), clients)
            assert terms.shares == min(7, clients)
            assert 2 * terms.shares / 3 < terms.threshold <= terms.shares


def test_flowers_masks_have_few_seeds_and_ours_all_bits() -> None:
    """Secrets that agree in Flower's 32 bits of XOR give its mask again, but not ours."""
    one = bytes(range(32))
    other = one[4:8] + one[:4] + one[8:]
    first, second = (flower.pseudo_rand_gen(s, MODULUS, [(8,)])[0] for s in (one, other))
    assert (first == second).all()
    assert (stream(one, 8) != stream(other, 8)).any()
    assert (mask(one, 9) != mask(other, 9)).any()
    assert (stream(one, 8) == stream(one, 9)[:8]).all()
    spread = np.bincount(stream(one, 2**16).view(np.uint8), minlength=256)
    assert np.abs(spread - 1024).max() < 6 * 32, "bytes are even: standard deviation 32"
