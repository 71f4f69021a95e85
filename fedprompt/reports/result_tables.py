"""The tables that a run prints last: its results beside the baselines, and those of protocols."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group

from fedprompt.reports.format import (
    ResultRow,
    Table,
    best_of,
    human_bytes,
    percent,
    percent_spread,
    plural,
    result_rows,
)
from fedprompt.reports.marks import mark_texts
from fedprompt.reports.score_names import ACCURACY, called
from fedprompt.reports.terminal import fields, fitted

COLUMNS: tuple[str, ...] = (
    "global\naccuracy",
    "personalised\nmean ± std",
    "worst\nclient",
    "10th\npct.",
    "personal on\nglobal test",
)
COMPARED_BY = ("global_accuracy", "mean", "worst", "p10", "on_global_mean")
"""Attributes of a `ResultRow` by which the columns are compared."""
LISTED = 8
"""Maximum number of clients that a note names."""


def summary_table(summary: Mapping[str, Any], width: int) -> Group:
    """Build the table that a run prints last: its results beside the baselines, and its traffic.

    The best value of every column is bold, whichever row it is in.

    Args:
        summary: The content of `summary.json`.
        width: Width of the terminal, in characters.
    """
    rows = result_rows(summary)
    cells = [(row.name, *_cells(row)) for row in rows]
    columns = called(str(summary.get("score") or ACCURACY), COLUMNS)
    if any(row.attack_success is not None for row in rows):
        # Only runs with a backdoor have this column.
        columns = (*columns, "attack\nsuccess")
        cells = [
            (*cell, percent(row.attack_success)) for cell, row in zip(cells, rows, strict=True)
        ]
    first, *others = fields(("", *columns), cells)
    for field, name in zip(others, COMPARED_BY, strict=False):
        for i in best_of([getattr(row, name) for row in rows]):
            field.cells[i].stylize("bold")
    return fitted(
        first,
        others,
        width,
        title=f"{summary.get('experiment', 'run')}, round {summary.get('rounds', '?')}",
        note="\n".join([*_traffic(summary), *mark_texts(summary), *remarks(summary)]),
    )


def protocol_tables(tables: Sequence[Table], width: int) -> list[Group]:
    """Lay out the tables of evaluation protocols for a terminal of `width` characters."""
    groups = []
    for table in tables:
        first, *columns = fields(table.columns, table.rows)
        groups.append(fitted(first, columns, width, title=table.title, note=table.note))
    return groups


def remarks(summary: Mapping[str, Any]) -> list[str]:
    """Say what is not matched, who differs or did not train, and what rests on few images.

    Args:
        summary: The content of `summary.json`.
    """
    found = []
    if summary.get("score") == "mAP":
        found.append("images have several labels: all scores are mean average precision (mAP)")
    alone = (summary.get("local_only") or {}).get("context_tokens")
    tokens, method = summary.get("context_tokens"), summary.get("method", "method")
    if alone is not None and tokens != alone:
        has = "no text prompt" if tokens is None else f"prompts of {plural(tokens, 'token')}"
        found.append(
            f"not matched: local-only has prompts of {plural(alone, 'token')}, {method} has {has}"
        )
    unlabelled = summary.get("unlabelled_clients") or {}
    if clients := unlabelled.get("clients"):
        found.append(
            f"{len(clients)} of {plural(summary.get('clients') or 0, 'client')} without labels "
            f"({_listed(clients)}): "
            + ("trained without them" if unlabelled.get("train") else "tested, but not trained")
        )
    if clients := summary.get("late_clients"):
        found.append(
            f"{len(clients)} of {plural(summary.get('clients') or 0, 'client')} joined after the "
            f"last round ({_listed(clients)}): tested, but not trained"
        )
    if absent := summary.get("absent_updates"):
        found.append(
            f"simulated: of {plural(absent['asked'], 'update')}, {absent['dropped_out']:,} were "
            f"lost with clients that dropped out, and {absent['late']:,} came late"
        )
    for name, part in (summary.get("by_backbone") or {}).items():
        found.append(
            f"backbone {name} ({plural(len(part['clients']), 'client')}: "
            f"{_listed(part['clients'])}): personalised {percent(part['personal'])}, global "
            f"{percent(part['global'])}"
        )
    spent = summary.get("privacy") or {}
    for key, whose in (("epsilon", "clients"), ("image_epsilon", "single images")):
        if spent.get(key) is not None:
            found.append(
                f"differential privacy of {whose}: epsilon {spent[key]:.3g} at delta "
                f"{spent['delta']:g}, for what clients upload"
            )
    few = summary.get("few_test_images") or {}
    if clients := few.get("clients"):
        verb = "has" if len(clients) == 1 else "have"
        found.append(
            f"{plural(len(clients), 'client')} {verb} fewer than {few.get('below')} test images "
            f"({_listed(clients)}): their accuracies are coarse"
        )
    return called(str(summary.get("score") or ACCURACY), found)


def _listed(clients: Sequence[int]) -> str:
    return ", ".join(map(str, clients[:LISTED])) + (", ..." if len(clients) > LISTED else "")


def _cells(row: ResultRow) -> tuple[str, ...]:
    return (
        percent(row.global_accuracy),
        percent_spread(row.mean, row.std),
        percent(row.worst),
        percent(row.p10),
        percent_spread(row.on_global_mean, row.on_global_std),
    )


def _traffic(summary: Mapping[str, Any]) -> list[str]:
    lines, parts = [], []
    uploaded = summary.get("uploaded_numbers_per_client_round")
    if uploaded is not None:
        lines.append(f"{plural(uploaded, 'number')} up per client and round")
    if summary.get("bytes_up") is not None:
        parts.append(f"{human_bytes(summary['bytes_up'])} up")
    if summary.get("bytes_down") is not None:
        parts.append(f"{human_bytes(summary['bytes_down'])} down")
    if summary.get("rejected_replies"):
        parts.append(f"{plural(summary['rejected_replies'], 'reply')} rejected")
    return [*lines, *([", ".join(parts)] if parts else [])]
