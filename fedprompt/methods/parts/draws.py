"""Random draws of local steps, made for many steps at once.

A draw is keyed by its purpose, step, round and client, so that a client's numbers do not depend on
who trains beside it. Each key has a generator of its own on the CPU, which is slow beside a GPU:
drawn step by step, the device would wait in every step, and every step would copy. `Batch.normal`
and `Batch.uniform` therefore ask here, and the same numbers come from few large draws.

Shape suffixes: S steps, K clients.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

AT_ONCE = 2**26
"""Bytes of one draw, 64 MiB, unless a single step needs more."""

Draw = Callable[..., Tensor]
"""From a shape, a seed and a purpose to a tensor on the CPU; the same tensor every time."""


class StepDraws:
    """The draws of a block of clients in one round.

    It only remembers the result of pure functions: whether a draw is remembered changes no number.

    Args:
        clients: ids of the clients, most steps first.
        steps: the number of local steps of each.
        device: where the draws are used.
    """

    def __init__(
        self, clients: tuple[int, ...], steps: tuple[int, ...], device: torch.device
    ) -> None:
        self._clients, self._steps, self._device = clients, steps, device
        self._drawn: dict[tuple[object, ...], tuple[int, Tensor]] = {}

    def rows(
        self,
        draw: Draw,
        shape: tuple[int, ...],
        seed: int,
        purpose: tuple[str | int, ...],
        server_round: int,
        step: int,
    ) -> Tensor:
        """The draws (K, *shape) of one step; rows of clients that have finished are zeros.

        Args:
            draw: draws one client's tensor of one step.
            shape: its shape.
            seed: the seed of the run.
            purpose: what the draw is for.
            server_round: the round.
            step: the step's number in the round, from 0.
        """
        key = (draw, shape, seed, purpose, server_round)
        first, drawn_SK = self._drawn.get(key, (0, torch.empty(0)))
        if not first <= step < first + len(drawn_SK):
            one = torch.empty(len(self._clients), *shape)
            count = max(1, AT_ONCE // max(1, one.numel() * one.element_size()))
            steps = range(step, max(step + 1, min(step + count, max(self._steps))))
            drawn_SK = torch.zeros(len(steps), *one.shape)
            for row, at in enumerate(steps):
                for k, client in enumerate(self._clients):
                    if at < self._steps[k]:
                        drawn_SK[row, k] = draw(shape, seed, *purpose, at, server_round, client)
            first, drawn_SK = self._drawn[key] = step, drawn_SK.to(self._device)
        return drawn_SK[step - first]
