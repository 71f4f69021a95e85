"""What a result is marked with: clients that diverged, and clients whose updates did not count.

A client is marked if its loss or its prompts were not finite in a round, or if more than a tenth of
the updates that it was asked for were dropped, whatever the reason. The marks are computed from
`metrics.jsonl`, so a resumed or an unfinished run has the same ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fedprompt.runtime.faults import kind_of, named

MOST_DROPPED = 0.1
"""The share of a client's updates that may be dropped before it is marked."""


def marks(
    lines: Sequence[Mapping[str, Any]], asked: Mapping[int, int] | None = None
) -> list[dict[str, Any]]:
    """The marked clients of a run.

    Args:
        lines: The rounds of the run in `metrics.jsonl`.
        asked: How often each client was asked to train; None takes every round with training.

    Returns:
        One entry per marked client, as plain JSON: `client`, the number of its updates that were
        `asked` for and `dropped`, `diverged_in_round` (the first round in which something was not
        finite, or None), and the `reason` for most of this, as it was first given.
    """
    trained = [line for line in lines if line.get("clients")]
    first: dict[int, int] = {}
    reasons: dict[int, list[str]] = {}
    dropped: Counter[int] = Counter()
    for line in trained:
        for client, what in line.get("diverged", {}).items():
            first.setdefault(int(client), line["round"])
            reasons.setdefault(int(client), []).append(what)
        for client, why in line.get("dropped", {}).items():
            dropped[int(client)] += 1
            if client not in line.get("diverged", {}):
                reasons.setdefault(int(client), []).append(why)
    found = []
    for client in sorted(first.keys() | dropped):
        times = len(trained) if asked is None else asked.get(client, 0)
        # A node that answered although it was not counted as asked is no reason for "3 of 2".
        times = max(times, dropped[client])
        if client in first or dropped[client] > MOST_DROPPED * times:
            found.append(
                {
                    "client": client,
                    "diverged_in_round": first.get(client),
                    "dropped": dropped[client],
                    "asked": times,
                    "reason": _most_common(reasons[client]),
                }
            )
    return found


def mark_texts(summary: Mapping[str, Any]) -> list[str]:
    """Say what a run is marked with, one text per kind of mark; none for most runs.

    Args:
        summary: The content of `summary.json`.
    """
    entries = summary.get("marks") or []
    diverged = [m for m in entries if m["diverged_in_round"] is not None]
    texts = []
    if diverged:
        rounds = [m["diverged_in_round"] for m in diverged]
        when = f"in round {rounds[0]}" if len(set(rounds)) == 1 else f"from round {min(rounds)} on"
        texts.append(f"{_clients(diverged)} diverged {when}; {_dropped(diverged)}")
    if others := [m for m in entries if m["diverged_in_round"] is None]:
        often = _most_common([m["reason"] for m in others])
        texts.append(f"{_clients(others)}: {_dropped(others)} ({often})")
    for name, part in (("personal", summary), ("local-only", summary.get("local_only") or {})):
        if clients := (part.get("personal") or {}).get("not_finite"):
            models, it = ("model", "is") if len(clients) == 1 else ("models", "are")
            texts.append(
                f"the {name} {models} of {named(clients)} {it} not finite: images without a finite "
                "answer count as wrong"
            )
    if unanswered := (summary.get("global") or {}).get("unanswered"):
        texts.append(
            f"the global model is not finite: {unanswered} images without a finite answer count as "
            "wrong"
        )
    return texts


def mark_line(summary: Mapping[str, Any]) -> str | None:
    """Say everything that a run is marked with in one line; None for most runs.

    Args:
        summary: The content of `summary.json`.
    """
    return "; ".join(mark_texts(summary)) or None


def _most_common(reasons: Sequence[str]) -> str:
    """The first of the reasons that differ in their numbers only and are the most frequent."""
    (kind, _), *_ = Counter(map(kind_of, reasons)).most_common(1)
    return next(reason for reason in reasons if kind_of(reason) == kind)


def _clients(entries: Sequence[Mapping[str, Any]]) -> str:
    return named([m["client"] for m in entries])


def _dropped(entries: Sequence[Mapping[str, Any]]) -> str:
    dropped, asked = (sum(m[key] for m in entries) for key in ("dropped", "asked"))
    return f"{dropped:,} of {asked:,} updates dropped"
