"""The ranking of one suite at one setting: accuracies, score, average rank, significance, cost.

Mean and standard deviation are over seeds. The score of a row is the mean over the scenarios of
these means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedprompt.leaderboard.collect import Entry, Suite
from fedprompt.leaderboard.ranks import Ranks, rank
from fedprompt.reports.compare.statistics import Cell, column
from fedprompt.suites.result_file import SeedResult, SettingResult

Setting = Literal["tuned", "default"]
Metric = Literal["value", "last", "global", "personal", "worst"]
Blocks = Literal["scenarios", "runs"]
FEWEST_FOR_WILCOXON = 6
"""With fewer blocks than this, the smallest possible p of the test, 2^(1 - B), is above 0.05."""
SCORE, RANK = "score", "rank"
"""What a board can be ordered by, besides the names of scenarios."""


@dataclass(frozen=True)
class Cost:
    """What one run of a row costs: means over its scenarios and seeds.

    Attributes:
        bytes_up: Bytes that the clients sent.
        bytes_down: Bytes that the server sent.
        client_steps: Optimiser steps of all clients.
        seconds: Wall time, without that of the search.
        peak_memory: The largest of all runs, in bytes; None if no run measured it.
    """

    bytes_up: float
    bytes_down: float
    client_steps: float
    seconds: float
    peak_memory: int | None

    @property
    def traffic(self) -> float:
        """Bytes in both directions."""
        return self.bytes_up + self.bytes_down


@dataclass(frozen=True)
class Line:
    """A ranked row.

    Attributes:
        entry: Where it comes from.
        cells: Its accuracies by scenario. `p` is of paired t-tests over seeds.
        score: The mean over scenarios. Its values by seed are means over the scenarios, and `p` is
            of a Wilcoxon signed-rank test over blocks; both are missing where they make no sense.
        rank: Its average rank over blocks.
        cost: Its cost.
        diverged: What diverged: scenario, seed and a text.
    """

    entry: Entry
    cells: Mapping[str, Cell]
    score: Cell
    rank: float
    cost: Cost
    diverged: tuple[tuple[str, int, str], ...]

    @property
    def row(self) -> str:
        """The name of the row."""
        return self.entry.result.row


@dataclass(frozen=True)
class Incomplete:
    """A row that is not ranked.

    Attributes:
        entry: Where it comes from.
        missing: What it lacks, e.g. `few-shot (seeds 2, 3), label-skew`.
        diverged: What diverged in the runs that it has, which may be why: scenario, seed and text.
    """

    entry: Entry
    missing: str
    diverged: tuple[tuple[str, int, str], ...]

    @property
    def row(self) -> str:
        """The name of the row."""
        return self.entry.result.row


@dataclass(frozen=True)
class Board:
    """The ranking of one suite at one setting.

    Attributes:
        suite: The suite.
        setting: The setting.
        metric: Which number is compared; `value` is the metric of each scenario.
        kind: What a block is.
        lines: The complete rows in order.
        ranks: The test of their average ranks, in the same order.
        incomplete: The other rows of this setting.
    """

    suite: Suite
    setting: Setting
    metric: Metric
    kind: Blocks
    lines: tuple[Line, ...]
    ranks: Ranks
    incomplete: tuple[Incomplete, ...]


def make_board(
    suite: Suite,
    setting: Setting,
    *,
    metric: Metric = "value",
    kind: Blocks = "scenarios",
    by: str = SCORE,
) -> Board | None:
    """Rank the rows of a suite that have all of its scenarios and seeds.

    Args:
        suite: The suite.
        setting: Which settings of the rows are compared.
        metric: Which number of the runs is compared.
        kind: What a block of the tests is: a scenario, with the mean over its seeds, or each run.
        by: What the rows are ordered by: `score`, `rank`, or a scenario.

    Returns:
        The board; None if no row was run with this setting.
    """
    complete: list[Entry] = []
    incomplete: list[Incomplete] = []
    for entry in suite.entries:
        if any(getattr(s, setting) for s in entry.result.scenarios.values()):
            missing = _missing(suite, entry, setting, metric)
            if missing:
                incomplete.append(Incomplete(entry, missing, _diverged(suite, entry, setting)))
            else:
                complete.append(entry)
    if not complete and not incomplete:
        return None
    lines, ranks = (
        _lines(suite, complete, setting, metric, kind) if complete else ((), Ranks(0, ()))
    )
    order = sorted(range(len(lines)), key=lambda i: _place(lines[i], by))
    place = {old: new for new, old in enumerate(order)}
    ranks = Ranks(
        ranks.blocks,
        tuple(ranks.averages[i] for i in order),
        ranks.statistic,
        ranks.p,
        ranks.critical_difference,
        tuple(tuple(place[i] for i in group) for group in ranks.groups),
    )
    return Board(
        suite, setting, metric, kind, tuple(lines[i] for i in order), ranks, tuple(incomplete)
    )


def _place(line: Line, by: str) -> tuple[float, float, str]:
    """The key by which lines are sorted; equal ones are sorted by rank and name."""
    first = {SCORE: line.score, RANK: None}.get(by, line.cells.get(by))
    # Rounded, as ties are in ranks.
    value = line.rank if first is None else -round(first.mean or 0.0, 12)
    return value, line.rank, line.row


def _lines(
    suite: Suite, entries: Sequence[Entry], setting: Setting, metric: Metric, kind: Blocks
) -> tuple[tuple[Line, ...], Ranks]:
    scenarios = list(suite.planned)
    values = {
        name: [
            {seed: _number(run, metric) for seed, run in _measured(e, name, setting).seeds.items()}
            for e in entries
        ]
        for name in scenarios
    }
    cells = {name: column(values[name], higher_is_better=True, test="t") for name in scenarios}
    means_MS = [[cells[name][i].mean or 0.0 for name in scenarios] for i in range(len(entries))]
    blocks_MB = [
        means
        if kind == "scenarios"
        else [values[name][i][seed] for name in scenarios for seed in suite.planned[name]]
        for i, means in enumerate(means_MS)
    ]
    ranks = rank(blocks_MB)
    enough = ranks.blocks >= FEWEST_FOR_WILCOXON
    tested = column(
        [dict(enumerate(blocks)) for blocks in blocks_MB],
        higher_is_better=True,
        test="wilcoxon" if enough else "none",
    )
    scores = column(
        [_scores_by_seed(suite, values, i) or {0: float(np.mean(means_MS[i]))}
         for i in range(len(entries))],
        higher_is_better=True, test="none",
    )  # fmt: skip
    lines = tuple(
        Line(
            entry=entry,
            cells={name: cells[name][i] for name in scenarios},
            score=Cell(scores[i].by_seed, scores[i].best, tested[i].p),
            rank=ranks.averages[i],
            cost=_cost(suite, entry, setting),
            diverged=_diverged(suite, entry, setting),
        )
        for i, entry in enumerate(entries)
    )
    return lines, ranks


def _scores_by_seed(
    suite: Suite, values: Mapping[str, Sequence[Mapping[int, float]]], i: int
) -> dict[int, float]:
    """The means over scenarios of a row, by seed; empty if the scenarios have different seeds."""
    seeds = {frozenset(planned) for planned in suite.planned.values()}
    if len(seeds) > 1:
        return {}
    return {
        seed: float(np.mean([values[name][i][seed] for name in suite.planned]))
        for seed in sorted(next(iter(seeds)))
    }


def _missing(suite: Suite, entry: Entry, setting: Setting, metric: Metric) -> str:
    """What a row lacks, in words; empty if it is complete."""
    parts = []
    for name, planned in suite.planned.items():
        scenario = entry.result.scenarios.get(name)
        measured: SettingResult | None = getattr(scenario, setting) if scenario else None
        runs = measured.seeds if measured else {}
        missing = [seed for seed in planned if seed not in runs or _lacks(runs[seed], metric)]
        if missing:
            word = "seed" if len(missing) == 1 else "seeds"
            seeds = f" ({word} {', '.join(map(str, missing))})"
            parts.append(name + seeds * (len(missing) < len(planned)))
    return ", ".join(parts)


def _lacks(run: SeedResult, metric: Metric) -> bool:
    return _value(run, metric) is None


def _value(run: SeedResult, metric: Metric) -> float | None:
    found: float | None = getattr(run, "global_" if metric == "global" else metric)
    return found


def _number(run: SeedResult, metric: Metric) -> float:
    """A number that is known to be there."""
    value = _value(run, metric)
    assert value is not None
    return value


def _measured(entry: Entry, scenario: str, setting: Setting) -> SettingResult:
    """The results of a complete row."""
    found: SettingResult = getattr(entry.result.scenarios[scenario], setting)
    return found


def _runs(suite: Suite, entry: Entry, setting: Setting) -> list[SeedResult]:
    return [run for name in suite.planned for run in _measured(entry, name, setting).seeds.values()]


def _cost(suite: Suite, entry: Entry, setting: Setting) -> Cost:
    runs = _runs(suite, entry, setting)
    peaks = [run.peak_memory_bytes for run in runs if run.peak_memory_bytes is not None]
    return Cost(
        bytes_up=float(np.mean([run.bytes_up for run in runs])),
        bytes_down=float(np.mean([run.bytes_down for run in runs])),
        client_steps=float(np.mean([run.client_steps for run in runs])),
        seconds=float(np.mean([run.seconds for run in runs])),
        peak_memory=max(peaks, default=None),
    )


def _diverged(suite: Suite, entry: Entry, setting: Setting) -> tuple[tuple[str, int, str], ...]:
    """What diverged; the row may be incomplete."""
    found = []
    for name in suite.planned:
        scenario = entry.result.scenarios.get(name)
        measured: SettingResult | None = getattr(scenario, setting) if scenario else None
        for seed, run in sorted(measured.seeds.items()) if measured else ():
            if run.diverged:
                found.append((name, seed, run.diverged))
    return tuple(found)
