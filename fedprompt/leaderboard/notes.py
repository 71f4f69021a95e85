"""What stands under the tables: what the numbers are, how they were tested, and what they omit."""

from __future__ import annotations

from collections.abc import Sequence

from fedprompt.leaderboard.board import FEWEST_FOR_WILCOXON, Board, Incomplete, Line
from fedprompt.leaderboard.ranks import LEVEL
from fedprompt.reports.compare.notes import MARK
from fedprompt.reports.format import plural

DIVERGED = "†"
NAMED = 4
"""Up to this many rows are named where a note speaks of some."""
FEW_BLOCKS = 10
"""Demšar (2006) advises more blocks than this for the distribution that Friedman's test assumes."""
METRICS = {
    "last": "the scenario's metric in the last round",
    "global": "accuracy on the server's test images",
    "personal": "mean over clients of the accuracy on their own test images",
    "worst": "lowest accuracy of a client on its own test images",
}


def accuracy_note(board: Board, *, scores: bool = True) -> str:
    """Say what the accuracies are, and what score and rank are if the table has them."""
    seeds = set(board.suite.planned.values())
    if max(map(len, seeds)) == 1:
        over = f"one seed, {min(seeds)[0]}" if len(seeds) == 1 else "one seed"
    else:
        which = f"seeds {', '.join(map(str, min(seeds)))}" if len(seeds) == 1 else "the seeds"
        over = f"mean ± sample standard deviation (n - 1) over {which}"
    sentences = [f"Accuracy in percent ({_metric(board)}): {over}."]
    if scores:
        scenarios = plural(len(board.suite.planned), "scenario")
        sentences.append(f"Score: mean over {scenarios}; rank: average rank over blocks.")
    return " ".join([*sentences, "Bold: best mean of the column."])


def _metric(board: Board) -> str:
    if board.metric != "value":
        return METRICS[board.metric]
    metrics = set(board.suite.metrics.values())
    return f"metric: {metrics.pop()}" if len(metrics) == 1 else "metric of each scenario"


def scenario_names(board: Board) -> list[str]:
    """The scenarios of a suite, with their metrics if these differ."""
    metrics = board.suite.metrics
    if board.metric != "value" or len(set(metrics.values())) < 2:
        return list(board.suite.planned)
    return [f"{name} ({metrics[name]})" for name in board.suite.planned]


def block_note(board: Board) -> str:
    """Say what a block is, and how far the tests reach."""
    if board.kind == "scenarios":
        text = (
            "Rows are ranked in blocks. A block is a scenario, with the mean over its seeds, "
            "because seeds that share images are no independent data sets."
        )
    else:
        text = (
            "Rows are ranked in blocks. A block is one seed of one scenario. The seeds of a "
            "scenario share its images, so the tests speak of other seeds of these scenarios, and "
            "not of other scenarios."
        )
    few = " With so few blocks, tests find only large differences."
    return text + few * (board.ranks.blocks <= FEW_BLOCKS)


def significance_note(board: Board) -> str:
    """Say what Friedman's test and those after it find."""
    ranks = board.ranks
    head = (
        f"{board.setting.capitalize()} settings, {plural(len(board.lines), 'row')} in "
        f"{plural(ranks.blocks, 'block')}:"
    )
    if ranks.p is None or ranks.statistic is None or ranks.critical_difference is None:
        return f"{head} no test, which takes at least three rows and two blocks."
    found = "the rows differ" if ranks.differ else f"no difference at the level of {LEVEL:g}"
    sentences = [
        f"{head} Friedman's test gives chi-squared {ranks.statistic:.2f}, p = {ranks.p:.2g}: "
        f"{found}.",
    ]
    if ranks.differ:
        sentences.append(
            "By Nemenyi's test, two rows differ if their average ranks are at least "
            f"{ranks.critical_difference:.2f} apart."
        )
    if any(line.score.differs for line in board.lines):
        sentences.append(
            f"{MARK}: differs from the best score, p < {LEVEL:g} in a Wilcoxon signed-rank test "
            "over blocks, Holm-corrected."
        )
    elif ranks.blocks >= FEWEST_FOR_WILCOXON:
        sentences.append(
            "By Wilcoxon's signed-rank test over blocks, Holm-corrected, no row differs from the "
            "best score."
        )
    return " ".join(sentences)


def search_note(boards: Sequence[Board]) -> str:
    """Say which search chose the tuned settings of which rows."""
    searches: dict[str, list[str]] = {}
    for board in boards:
        if board.setting == "tuned":
            for line in board.lines:
                searches.setdefault(line.entry.result.search, []).append(line.row)
    if not searches:
        return ""
    texts = [f"{search or 'not searched'} ({_who(rows)})" for search, rows in searches.items()]
    return f"Tuned settings were chosen by: {'; '.join(texts)}."


def cost_note(boards: Sequence[Board]) -> str:
    """Say what the costs are, and on how many kinds of machines they were measured."""
    machines = {
        tuple(sorted(line.entry.result.machine.items())) for board in boards for line in board.lines
    }
    text = (
        f"Costs: one run with {boards[0].setting} settings, without the search; mean over "
        "scenarios and seeds, and the largest peak memory."
    )
    if len(machines) > 1:
        text += (
            f" They were measured on {len(machines)} different machines: compare no time and no "
            "memory."
        )
    return text


def divergence_note(board: Board) -> str:
    """List what diverged in the rows that are ranked."""
    parts = [text for line in board.lines for text in divergences(line)]
    return f"{DIVERGED}: {'; '.join(parts)}." if parts else ""


def divergences(of: Line | Incomplete) -> list[str]:
    """What diverged in a row, e.g. `FedX, few-shot, seed 2: client 6 diverged in round 4`."""
    return [f"{of.row}, {scenario}, seed {seed}: {text}" for scenario, seed, text in of.diverged]


def versions_note(boards: Sequence[Board]) -> str:
    """Name the versions behind the numbers, each value once; nothing if the files name none."""
    found: dict[str, dict[str, None]] = {}
    for board in boards:
        for line in board.lines:
            for name, version in line.entry.result.versions.items():
                # A dictionary without values is a set that keeps its order.
                found.setdefault(name, {})[version] = None
    parts = [f"{name} {' and '.join(versions)}" for name, versions in found.items()]
    return f"Made with {', '.join(parts)}." if parts else ""


def _who(rows: Sequence[str]) -> str:
    return "; ".join(rows) if len(rows) <= NAMED else plural(len(rows), "row")
