"""The report of one run as one HTML file: results, figures, clients, config and how to repeat it.

It is written at the end of a run and by `fedprompt report`. The file needs no other file and
contains no link (see `page.py`).
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedprompt.data.partition import dense
from fedprompt.errors import UserError
from fedprompt.files import write_bytes
from fedprompt.reports.client_figure import MANY, alone_of
from fedprompt.reports.draw import is_ours, save_all
from fedprompt.reports.figure import Figure
from fedprompt.reports.format import (
    MISSING,
    ResultRow,
    Table,
    best_of,
    human_bytes,
    human_time,
    percent,
    percent_spread,
    result_rows,
)
from fedprompt.reports.marks import mark_texts, marks
from fedprompt.reports.page import count, render
from fedprompt.reports.result_tables import remarks
from fedprompt.reports.run_data import (
    CONFIG,
    FEW_TEST_IMAGES,
    METRICS,
    REPORT,
    SUMMARY,
    RunData,
    accuracy_of,
)
from fedprompt.reports.run_figures import run_figures

TEMPLATE = "report.html.j2"
PROTOCOL = "protocol_"
"""Prefix of the names of protocols' figures."""


@dataclass(frozen=True)
class ClientRow:
    """One client's line in the table; None means unknown or not tested.

    `diverged` says that the personal model behind `accuracy` is not finite, and `labelled` that the
    training images have labels.
    """

    client: int
    train_images: int | None
    test_images: int | None
    classes_held: int | None
    accuracy: float | None
    alone: float | None
    zero_shot: float | None
    diverged: bool
    labelled: bool

    @property
    def few(self) -> bool:
        """Whether the accuracies rest on so few images that they say little."""
        return self.test_images is not None and 0 < self.test_images < FEW_TEST_IMAGES


def write_report(
    run: RunData, tables: Sequence[Table] = (), figures: Sequence[Figure] = ()
) -> Path:
    """Draw a run's figures into `plots/` and write its `report.html`.

    Args:
        run: The run, finished or not.
        tables: The tables of the run's evaluation protocols.
        figures: The figures of the run's evaluation protocols, named like them.

    Returns:
        The path of `report.html` in the run folder.

    Raises:
        UserError: A file cannot be written.
    """
    # The prefix separates a protocol's file from the run's other figures and from the user's files.
    named = [replace(figure, name=f"{PROTOCOL}{figure.name}") for figure in figures]
    drawn = [*run_figures(run), *named]
    path = run.path / REPORT
    try:
        draw_all(drawn, run.path / "plots")
        html = render(TEMPLATE, drawn, {**_content(run), "protocols": tables})
        # Names of files and classes need not be valid UTF-8.
        write_bytes(path, html.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise UserError(
            f"the report cannot be written to {run.path}: {error.strerror}; 'fedprompt report "
            f"{run.path}' draws it again, and the results in the folder are complete without it."
        ) from None
    return path


def draw_all(figures: Sequence[Figure], folder: Path) -> list[Path]:
    """Write a run's figures as PNG files, and remove our figures of an earlier state of the run.

    Args:
        figures: Every figure that the run has.
        folder: The run's folder of figures, which is created if necessary.

    Returns:
        The paths of the files, in the order of the figures.

    Raises:
        OSError: A file cannot be written.
    """
    drawn = save_all(figures, folder)
    # Protocols may have been removed from the config since, so stale files must not remain. Only
    # files with our mark are removed: everything else in the folder belongs to the user.
    for other in set(folder.glob("*.png")) - set(drawn):
        if is_ours(other):
            other.unlink()
    return drawn


def summary_of(run: RunData) -> dict[str, Any]:
    """Return the run's summary; for an unfinished run, what its metrics lines contain so far."""
    if run.summary is not None:
        return run.summary
    # An unfinished run has no summary, so the last measured values stand in for the final ones.
    last_alone = next((x for x in reversed(run.local_only) if x.get("personal")), None)
    return {
        "experiment": run.config.get("experiment"),
        "method": _named(run.config, "method"),
        "strategy": _named(run.config, "strategy"),
        "seed": run.config.get("seed"),
        "rounds": run.rounds[-1]["round"],
        "data": (run.config.get("data") or {}).get("title"),
        "score": run.score,
        "global": run.last("global"),
        "personal": run.last("personal"),
        "personal_on_global": run.last("personal_on_global"),
        "backdoor": run.last("backdoor"),
        "local_only": last_alone,
        "marks": marks(run.rounds),
        "bytes_up": sum(line.get("bytes_up") or 0 for line in run.rounds),
        "bytes_down": sum(line.get("bytes_down") or 0 for line in run.rounds),
    }


def client_rows(run: RunData, summary: Mapping[str, Any]) -> list[ClientRow]:
    """Return images, classes and accuracies of the clients, ordered by id.

    Of more than `MANY` clients, only the `MANY` with the lowest accuracies are returned, lowest
    first.

    Args:
        run: The run.
        summary: Its summary (see `summary_of`), for zero-shot accuracies.
    """
    personal = accuracy_of(run.last("personal"))
    zero_shot = accuracy_of((summary.get("zero_shot") or {}).get("personal"))
    alone = alone_of(run)
    diverged = (run.last("personal") or {}).get("not_finite") or []
    partition = run.partition or {}
    classes = len(partition.get("class_names") or [])
    train_KC = dense(partition.get("train_counts") or [], classes)
    test_KC = dense(partition.get("test_counts") or [], classes)
    unlabelled = set(partition.get("unlabelled_clients") or ())
    clients = range(max(len(train_KC), max(personal, default=-1) + 1))
    listed = list(clients)
    if len(clients) > MANY:
        # The id breaks ties, so that the same run always gives the same page.
        listed = sorted(personal, key=lambda k: (personal[k], k))[:MANY]
    return [
        ClientRow(
            client=k,
            train_images=int(train_KC[k].sum()) if k < len(train_KC) else None,
            test_images=int(test_KC[k].sum()) if k < len(test_KC) else None,
            classes_held=int((train_KC[k] > 0).sum()) if k < len(train_KC) else None,
            accuracy=personal.get(k),
            alone=alone.get(k),
            zero_shot=zero_shot.get(k),
            diverged=k in diverged,
            labelled=k not in unlabelled,
        )
        for k in listed
    ]


def _content(run: RunData) -> dict[str, Any]:
    summary = summary_of(run)
    rows = result_rows(summary)
    source = run.path / (METRICS if run.summary is None else SUMMARY)
    finished_at = datetime.fromtimestamp(source.stat().st_mtime, tz=UTC)
    folder = run.path.resolve().name
    planned = (run.config.get("federation") or {}).get("rounds")
    return {
        "title": _title(summary, folder),
        "facts": _facts(summary, finished_at),
        "unfinished": run.summary is None,
        "progress": f"{run.rounds[-1]['round']} of {planned if planned is not None else '?'}",
        "headlines": _headlines(summary, rows),
        "models": [row.name for row in rows],
        "results": _results(rows),
        "marks": mark_texts(summary),
        "remarks": remarks(summary),
        "clients": client_rows(run, summary),
        "few_test_images": FEW_TEST_IMAGES,
        "score": run.score,
        "clients_title": _clients_title(run),
        "config_text": (run.path / CONFIG).read_text(encoding="utf-8"),
        "environment": _environment(run, summary),
        # The config may name the run's own folder, and a run never overwrites a folder.
        "command": shlex.join(
            ["fedprompt", "run", f"{folder}/config.yaml", f"output.dir={folder}-again"]
        ),
    }


def _results(rows: Sequence[ResultRow]) -> list[tuple[str, list[tuple[str, bool]]]]:
    """Return the lines of the table of results: per model a text, and whether it is the best."""
    lines = [
        ("Global", "global_accuracy", None),
        ("Personalised", "mean", "std"),
        ("Worst client", "worst", None),
        ("10th percentile", "p10", None),
        ("Personal on global test", "on_global_mean", "on_global_std"),
    ]
    results = []
    for label, name, std in lines:
        values = [getattr(row, name) for row in rows]
        best = best_of(values)
        texts = [
            percent_spread(value, getattr(row, std)) if std else percent(value)
            for value, row in zip(values, rows, strict=True)
        ]
        results.append((label, [(text, i in best) for i, text in enumerate(texts)]))
    success = [row.attack_success for row in rows]
    if any(value is not None for value in success):
        # Only runs with a backdoor have this line; no model is best in it.
        results.append(("Attack success", [(percent(value), False) for value in success]))
    return results


def _clients_title(run: RunData) -> str:
    many = len((run.partition or {}).get("train_counts") or []) > MANY
    return f"The {MANY} clients with the lowest {run.score}" if many else "Clients"


def _title(summary: Mapping[str, Any], folder: str) -> str:
    data = f" on {summary['data']}" if summary.get("data") else ""
    return f"{summary.get('experiment') or folder}: {summary.get('method') or 'method'}{data}"


def _facts(summary: Mapping[str, Any], finished_at: datetime) -> list[str]:
    strategy, seed = summary.get("strategy"), summary.get("seed")
    facts = [f"strategy {strategy}" if strategy else None]
    facts += [f"backbone {summary['backbone']}" if summary.get("backbone") else None]
    facts += [f"{summary['clients']} clients" if summary.get("clients") else None]
    facts += [f"{summary['classes']} classes" if summary.get("classes") else None]
    facts += [f"{summary['rounds']} rounds" if summary.get("rounds") is not None else None]
    facts += [f"seed {seed}" if seed is not None else None, f"{finished_at:%Y-%m-%d %H:%M} UTC"]
    return [str(fact) for fact in facts if fact]


def _headlines(summary: Mapping[str, Any], rows: list[ResultRow]) -> list[tuple[str, str, str]]:
    """Return label, value and a small note of every headline number."""
    own = rows[-1]
    by_name = {row.name: row for row in rows[:-1]}
    zero_shot, alone = by_name.get("zero-shot"), by_name.get("local-only")
    uploaded = summary.get("uploaded_numbers_per_client_round")
    up, down = summary.get("bytes_up"), summary.get("bytes_down")
    return [
        ("Global", percent(own.global_accuracy), "server's test set"),
        ("Personalised", percent_spread(own.mean, own.std), "mean ± std over clients"),
        ("Worst client", percent(own.worst), "own test images"),
        ("10th percentile", percent(own.p10), "of the clients"),
        (
            "Zero-shot",
            percent(zero_shot.global_accuracy if zero_shot else None),
            f"own tests {percent(zero_shot.mean if zero_shot else None)}",
        ),
        (
            "Local-only",
            percent_spread(alone.mean, alone.std) if alone else MISSING,
            "trained alone, own tests",
        ),
        ("Uploaded", count(uploaded), "numbers per client and round"),
        (
            "Traffic up",
            MISSING if up is None else human_bytes(up),
            f"down {MISSING if down is None else human_bytes(down)}, whole run",
        ),
    ]


def _environment(run: RunData, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    lines = {str(k): str(v) for k, v in (summary.get("environment") or {}).items()}
    if summary.get("wall_s") is not None:
        lines["wall time"] = human_time(summary["wall_s"])
    for key, label in (("train_s", "training"), ("evaluate_s", "evaluation")):
        if run.timings:
            lines[label] = f"{sum(line.get(key) or 0.0 for line in run.timings):.1f} s"
    if summary.get("peak_memory_bytes") is not None:
        lines["peak memory"] = human_bytes(summary["peak_memory_bytes"])
    for key in ("client_steps", "rejected_replies", "skipped_images"):
        if summary.get(key) is not None:
            lines[key.replace("_", " ")] = str(summary[key])
    for kind in ("shared", "private"):
        tensors = summary.get(kind)
        if isinstance(tensors, dict):
            shapes = (f"{name} {' x '.join(map(str, shape))}" for name, shape in tensors.items())
            lines[f"{kind} tensors"] = ", ".join(shapes) or "none"
    return list(lines.items())


def _named(config: Mapping[str, Any], group: str) -> Any:
    value = config.get(group)
    return value.get("name") if isinstance(value, dict) else value
