"""The state of a federation as text, as a web page, and in Prometheus' text format."""

from __future__ import annotations

from typing import Any

from fedprompt.deploy.monitoring.collect import Status
from fedprompt.reports.format import percent
from fedprompt.reports.page import page_environment
from fedprompt.runtime.peer_text import sanitised

TEMPLATE = "status.html.j2"
REFRESH_S = 10
"""Seconds after which a browser loads the page again."""
WIDTH, HEIGHT = 320.0, 120.0
"""Size of a curve in the units of its SVG."""


def as_text(status: Status) -> str:
    """The state for a terminal."""
    lines = [f"server: {'running' if status.running else 'not running'}"]
    for node in status.nodes:
        until = f", approved until {node.approved_until}" if node.approved_until else ""
        seen = f" since {node.last_seen}" if node.last_seen else ""
        policy = f", policy {node.policy[:16]}" if node.policy else ""
        versions = "".join(f", {name} {version}" for name, version in node.versions.items())
        name = sanitised(node.name) or "no name"
        lines.append(f"client {node.client} ({name}): {node.state}{seen}{until}{policy}{versions}")
    if not status.nodes:
        lines.append("no node is approved")
    run = status.run
    if run is not None:
        state = "finished" if run.finished else "in progress or interrupted"
        lines.append(
            f"run {run.experiment} ({run.method}): round {run.round} of {run.rounds}, {state}; "
            f"{run.accepted} updates accepted, {run.dropped} dropped"
        )
        lines.append(f"run folder: {run.folder}")
    gpus = ", ".join(status.gpus) or "none"
    lines.append(f"disk: {status.disk_free_bytes / 1e9:.1f} GB free; GPUs: {gpus}")
    return "\n".join(lines)


def as_page(status: Status) -> str:
    """The state as one HTML page without scripts; it reloads itself."""
    curves = [] if status.run is None else [
        _drawn(name, points) for name, points in status.run.curves.items() if points
    ]  # fmt: skip
    return (
        page_environment()
        .get_template(TEMPLATE)
        .render(status=status, curves=curves, refresh=REFRESH_S, width=WIDTH, height=HEIGHT)
    )


def _drawn(name: str, points: list[tuple[int, float]]) -> dict[str, Any]:
    """A curve as the points of an SVG polyline, with its last value and its range."""
    rounds, values = [p[0] for p in points], [p[1] for p in points]
    low, high = min(values), max(values)
    across, up = max(1, rounds[-1] - rounds[0]), (high - low) or 1.0
    drawn = [
        f"{(r - rounds[0]) / across * WIDTH:.1f},{HEIGHT - (v - low) / up * HEIGHT:.1f}"
        for r, v in points
    ]
    shown = percent if name.endswith("accuracy") else "{:.3f}".format
    return {
        "name": name,
        "points": " ".join(drawn),
        "last": shown(values[-1]),
        "last_point": drawn[-1].split(","),
        "low": shown(low),
        "high": shown(high),
        "rounds": (rounds[0], rounds[-1]),
    }


def as_metrics(status: Status) -> str:
    """The state in Prometheus' text exposition format."""
    rows: list[tuple[str, str, str, float]] = [
        ("up", "Whether the SuperLink answers.", "", float(status.running)),
        ("disk_free_bytes", "Free space of the server's folder.", "", status.disk_free_bytes),
    ]
    for node in status.nodes:
        label = f'{{client="{node.client}",name="{_escaped(node.name)}"}}'
        online = float(node.state == "online")
        rows.append(("node_online", "Whether a node is connected.", label, online))
    if status.run is not None:
        run = status.run
        label = f'{{experiment="{_escaped(run.experiment)}",method="{_escaped(run.method)}"}}'
        rows += [
            ("round", "The last round that is over.", label, run.round),
            ("rounds", "The rounds of the run.", label, run.rounds),
            ("run_finished", "Whether the run has ended.", label, float(run.finished)),
            ("updates_accepted_total", "Updates that have counted.", label, run.accepted),
            ("updates_dropped_total", "Updates that have not counted.", label, run.dropped),
        ]
        for name, points in run.curves.items():
            if points:
                key = name.replace(" ", "_")
                rows.append((key, f"The last value of: {name}.", label, points[-1][1]))
    lines: list[str] = []
    for name, text, label, value in rows:
        full = f"fedprompt_{name}"
        if f"# HELP {full} {text}" not in lines:
            kind = "counter" if name.endswith("_total") else "gauge"
            lines += [f"# HELP {full} {text}", f"# TYPE {full} {kind}"]
        lines.append(f"{full}{label} {value:.10g}")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return sanitised(text).replace("\\", "\\\\").replace('"', '\\"')
