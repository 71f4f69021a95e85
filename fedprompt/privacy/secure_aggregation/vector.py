"""The vector that a client adds to the secret sum, and what the sum reveals to the server.

`encode` runs on the clients in the stage `collect`, `decode` on the server after unmasking.

With w in [0, 1] a client's weight divided by `max_weight`, Delta the change of its P shared
numbers, c the clip and L the largest loss, the vector is (w Delta / c, w, cut, w loss / L): P + 3
numbers in [-1, 1], rounded to multiples of 2 / T for T levels. Rounding is to the nearest multiple;
Flower's own rounding, which is random, then has nothing left to round, so that sums are exact and
repeatable.

Error of the mean change: every number, w included, is off by at most 1 / T. With the mean weight m
of the clients in the sum, the numbers contribute c / (T m) to it, and the weights 2 c / (T m).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedprompt.errors import UserError
from fedprompt.messages import Arrays

Numbers = NDArray[np.float64]
EXTRA = 3
"""Numbers of the vector beside those of the shared tensors: weight, cut, loss."""
DIVERGED = "the change of the shared tensors is not finite"
"""What a client whose training has diverged answers in place of a vector."""
LARGEST_LOSS = 100.0
"""Losses are clipped to this in absolute value."""


def size(shared: Arrays) -> int:
    """Length of the vector for these shared tensors."""
    return EXTRA + sum(a.size for a in shared.values())


def encode(
    received: Arrays, trained: Arrays, *, weight: float, loss: float, clip: float, levels: int
) -> tuple[Numbers, bool]:
    """A client's vector, and whether its change was cut off at `clip`.

    Args:
        received: shared tensors as the server sent them.
        trained: the same tensors after training.
        weight: the client's weight, in [0, 1].
        loss: mean loss of the training; NaN counts as the largest loss.
        clip: largest absolute change of a number.
        levels: number of steps in [-1, 1].

    Returns:
        The vector (P + 3,), and whether a number of the change exceeded `clip`.

    Raises:
        UserError: the change is not finite.
    """
    parts = [
        (trained[n].astype(np.float64) - received[n].astype(np.float64)).ravel()
        # Sorted by name, as in `decode`, so that both sides agree on the order.
        for n in sorted(received)
    ]
    change_P = np.concatenate([*parts, np.zeros(0)])
    if not np.isfinite(change_P).all():
        raise UserError(f"{DIVERGED}; nothing was sent.")
    cut = bool((np.abs(change_P) > clip).any())
    bounded = LARGEST_LOSS if np.isnan(loss) else float(np.clip(loss, -LARGEST_LOSS, LARGEST_LOSS))
    extra = [weight, float(cut), weight * bounded / LARGEST_LOSS]
    vector = np.concatenate([weight * np.clip(change_P, -clip, clip) / clip, extra])
    return np.rint(vector * (levels / 2)) * (2 / levels), cut


class Implausible(Exception):
    """A sum that cannot be that of honest clients; the message says what is wrong with it."""


def check_sum(total: Numbers, *, clients: int, levels: int, lightest: float) -> None:
    """Check a sum before it is used: masks hide what a single client adds, so nothing else can be.

    |w Delta / c| <= w and |w loss / L| <= w hold for every client, and therefore for the sum, apart
    from rounding. A client that sends other weights could otherwise make the sum of the weights
    negative or nearly zero, and the mean change as large as it likes.

    Args:
        total: the sum (P + 3,).
        clients: number of clients in the sum.
        levels: number of steps in [-1, 1].
        lightest: the smallest weight that a client can have, in (0, 1]; the largest is 1.

    Raises:
        Implausible: a client has sent something that no honest client sends.
    """
    weight, cut, _ = (float(v) for v in total[-EXTRA:])
    # Every number of a client is off by at most 1 / T.
    rounding = clients / levels
    low, high = clients * lightest - rounding, clients + rounding
    if not max(low, rounding) <= weight <= high:
        raise Implausible(f"the weights sum to {weight:.6g}, outside {low:.6g} to {high:.6g}")
    if not -rounding <= cut <= clients + rounding:
        raise Implausible(f"{cut:.6g} of {clients} clients claim that their change was cut off")
    weighted = np.delete(total, len(total) - 2)
    largest = float(np.abs(weighted).max())
    if not largest <= weight + 2 * rounding:
        raise Implausible(f"a number sums to {largest:.6g}, more than the weights, {weight:.6g}")


@dataclass(frozen=True)
class Decoded:
    """What the sum of some clients' vectors reveals.

    Attributes:
        change: weighted mean change of the shared tensors by name, float64.
        loss: weighted mean loss.
        cut: number of clients whose change was cut off.
    """

    change: Arrays
    loss: float
    cut: int


def decode(total: Numbers, shared: Arrays, clip: float) -> Decoded:
    """The reverse of `encode` for the sum of some clients' vectors.

    Args:
        total: the sum (P + 3,), which `check_sum` has accepted.
        shared: shared tensors that the clients received; only their names and shapes are used.
        clip: the clip of `encode`.

    Returns:
        The weighted means of the clients' changes and losses.
    """
    # (sum w, number of clients that were cut, sum w loss / L).
    weight, cut, loss = (float(v) for v in total[-EXTRA:])
    change, first = {}, 0
    for name in sorted(shared):
        last = shared[name]
        part = total[first : first + last.size] * (clip / weight)
        change[name], first = part.reshape(last.shape), first + last.size
    return Decoded(change, LARGEST_LOSS * loss / weight, round(cut))
