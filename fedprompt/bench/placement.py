"""Simulated seconds of a round under two rules that place client blocks on workers.

Longest first gives the longest waiting block to the first worker that is free. The planner of
`fedprompt.simulation.placement` learns how fast every worker is and may leave a block to a faster
worker that is still busy. Blocks have unequal amounts of work (log-normal, sigma 0.6), and the
seconds of each are disturbed by 10 % (log-normal).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedprompt.bench.output import Column, Output
from fedprompt.rng import generator
from fedprompt.simulation.placement import Costs, next_start, remaining

COLUMNS: tuple[Column, ...] = (
    ("workers", "case", ""),
    ("blocks per worker", "blocks_per_worker", "d"),
    ("planner s", "planner_s", ".3f"),
    ("longest first s", "longest_first_s", ".3f"),
    ("ratio", "ratio", ".3f"),
)
SPEEDS: dict[str, tuple[float, ...]] = {
    "4 equal": (1, 1, 1, 1),
    "2 of 4 at half speed": (1, 1, 0.5, 0.5),
    "1 of 4 at a third": (1, 1, 1, 1 / 3),
    "2 of 8 at a quarter": (1, 1, 1, 1, 1, 1, 0.25, 0.25),
}
"""Units of work per second of every worker, fastest first, which favours longest first."""
SPREAD, NOISE = 0.6, 0.1


@dataclass(frozen=True)
class PlacementOptions:
    """What `bench placement` simulates."""

    rounds: int = 20
    seeds: int = 30


@dataclass(frozen=True)
class _Running:
    """A block on a worker: its work, the seconds expected and needed, and when it began."""

    units: float
    expected_s: float
    seconds: float
    started: float


def bench_placement(options: PlacementOptions, out: Output) -> None:
    """Mean seconds per round of both rules, for workers of equal and of unequal speed."""
    for case, speeds in SPEEDS.items():
        for blocks in (1, 2, 4, 8):
            count = blocks * len(speeds)
            planner, longest = (
                float(np.mean([round_seconds(rule, speeds, count, options.rounds, seed)
                               for seed in range(options.seeds)]))
                for rule in ("planner", "longest first")
            )  # fmt: skip
            out.add(
                {
                    "case": case,
                    "blocks_per_worker": blocks,
                    "planner_s": planner,
                    "longest_first_s": longest,
                    "ratio": planner / longest,
                }
            )
    out.table(COLUMNS)


def round_seconds(
    rule: str, speeds: tuple[float, ...], blocks: int, rounds: int, seed: int
) -> float:
    """Mean simulated seconds per round, without the first round, which measures the workers.

    Args:
        rule: `planner` or `longest first`.
        speeds: units of work per second of every worker.
        blocks: blocks per round.
        rounds: rounds, two or more; the workers' costs are learned over them.
        seed: keys the blocks' work and the noise.

    Returns:
        The mean over all rounds except the first.
    """
    draw = generator(seed, "placement benchmark")
    costs = Costs()
    return float(np.mean([_round(rule, speeds, blocks, costs, draw) for _ in range(rounds)][1:]))


def _round(
    rule: str, speeds: tuple[float, ...], blocks: int, costs: Costs, draw: np.random.Generator
) -> float:
    waiting = sorted(draw.lognormal(0, SPREAD, blocks).tolist(), reverse=True)
    running: dict[int, _Running] = {}
    now = 0.0

    def expected(worker: int, units: float) -> float:
        return costs.seconds("train", worker, units)

    while waiting or running:
        free = [worker for worker in range(len(speeds)) if worker not in running]
        # Longest first: the first waiting block is the longest, and workers are sorted by speed.
        plan = (0, free[0]) if free and waiting else None
        if rule == "planner" and waiting:
            busy = {w: remaining(r.expected_s, now - r.started) for w, r in running.items()}
            plan = next_start(waiting, free, busy, expected)
        if plan is not None:
            position, worker = plan
            units = waiting.pop(position)
            seconds = units / speeds[worker] * float(draw.lognormal(0, NOISE))
            running[worker] = _Running(units, expected(worker, units), seconds, now)
            continue
        first = min(running, key=lambda w: running[w].started + running[w].seconds)
        done = running.pop(first)
        now = done.started + done.seconds
        costs.record("train", first, done.units, done.seconds)
    return now
