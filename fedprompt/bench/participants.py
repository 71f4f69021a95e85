"""What a participant costs in federations of many clients, of which a hundred train per round.

Every size runs in a process of its own, through the same server loop as `fedprompt run`, with
private tensors and checkpoints on disk and personal tests of the participants. For PromptFL, the
reference then trains one participant in the same process.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from fedprompt.bench.backbones import encode_all, random_clip, random_images
from fedprompt.bench.class_lists import class_names
from fedprompt.bench.compare import Row, clock, max_rel_diff, require_equal
from fedprompt.bench.isolated import in_fresh_process
from fedprompt.bench.job import Piece
from fedprompt.bench.machine import peak_mb
from fedprompt.bench.output import Column, Output
from fedprompt.bench.pieces import ReferencePieces, train_ours
from fedprompt.bench.workload import Sizes, make_workspace, random_features
from fedprompt.experiment.display import QuietDisplay
from fedprompt.experiment.rounds import run_server
from fedprompt.experiment.run_folder import RunFolder
from fedprompt.federation.server_app import Federation
from fedprompt.methods.registry import method_class
from fedprompt.reports.run_data import PRIVATE, TIMINGS
from fedprompt.simulation.inline_grid import InlineGrid
from fedprompt.simulation.private_log import PrivateLog

COLUMNS: tuple[Column, ...] = (
    ("case", "case", ""),
    ("ms per participant", "ours_ms", ".2f"),
    ("without tests", "training_ms", ".2f"),
    ("reference ms", "reference_ms", ".1f"),
    ("ratio", "ratio", ".1f"),
    ("against fewest clients", "slowdown", ".2f"),
    ("max rel. diff", "max_rel_diff", ".1e"),
    ("peak MB", "peak_mb", ".0f"),
    ("stored MB", "stored_mb", ".1f"),
)
TRAIN, TEST = 8, 2


@dataclass(frozen=True)
class ParticipantsOptions:
    """What `bench participants` measures."""

    clients: Sequence[int] = (100, 1000, 10_000)
    methods: Sequence[str] = ("promptfl", "fedrsclip")
    participants: int = 100
    rounds: int = 10
    classes: int = 10
    backbone: str = "tiny"
    device: str = "cpu"


def bench_participants(options: ParticipantsOptions, out: Output) -> None:
    """Measure every size and method.

    Raises:
        MismatchError: a participant's loss or prompts differ from the reference's.
    """
    for method in options.methods:
        method_class(method)  # an unknown name is refused before anything is measured
        first: Row | None = None
        for clients in options.clients:
            name = f"{method}, {clients} clients"
            out.progress(name)
            line = in_fresh_process(measure, options, clients, method)
            if line["max_rel_diff"] is not None:
                require_equal(name, line["max_rel_diff"])
            first = first or line
            slowdown = line["ours_s"] / first["ours_s"]
            out.add({"case": name, **line, "slowdown": slowdown})
    out.table(COLUMNS)
    out.note("Peak: of a fresh process for every size, including libraries.")


def measure(options: ParticipantsOptions, clients: int, method: str) -> Row:
    """Measure one size in this process.

    Args:
        options: what to measure.
        clients: number of clients.
        method: name of the method.

    Returns:
        A row without its case. Seconds are per participant and round: medians over all rounds
        without the first and the last.
    """
    clip = random_clip(options.backbone, device=options.device)
    sizes = Sizes(clients, TRAIN, TEST, 10 * options.classes)
    images_N3HW = random_images(clip, TRAIN, seed=0)
    features_ND = random_features(sizes.images, clip.embed_dim)
    features_ND[:TRAIN] = encode_all(clip, images_N3HW)
    participants = min(options.participants, clients)
    with tempfile.TemporaryDirectory(prefix="fedprompt-bench-") as name:
        workspace = make_workspace(
            clip,
            class_names(options.classes),
            sizes,
            features_ND,
            method={"name": method},
            federation={"rounds": options.rounds, "fraction": participants / clients},
            evaluation={"clients": "participants"},
            output={"dir": str(Path(name) / "run")},
        )
        folder = RunFolder.create(workspace.config)
        # On disk, as in `fedprompt run`, so that storing private tensors is part of the time.
        private = PrivateLog(folder.path / PRIVATE, clients)
        federation = Federation(workspace, InlineGrid(workspace, private))
        began = clock()
        run_server(federation, folder, QuietDisplay(Console(quiet=True)), None, private)
        total_s = clock() - began
        # Without the first round, which warms up, and the last, which writes the final results.
        lines = [x for x in folder.lines(TIMINGS) if 1 < x["round"] < options.rounds]
        stored = sum(p.stat().st_size for p in (folder.path / PRIVATE).rglob("*") if p.is_file())
        folder.close()
    line: dict[str, Any] = {
        "ours_s": median(x["train_s"] + x["evaluate_s"] for x in lines) / participants,
        "reference_s": None,
        "ratio": None,
        "max_rel_diff": None,
        "peak_mb": peak_mb(),
        "participants": participants,
        "clients": clients,
        "total_s": total_s,
        "stored_mb": stored / 1e6,
        "training_ms": 1e3 * median(x["train_s"] for x in lines) / participants,
    }
    if method == "promptfl":
        reference = ReferencePieces(workspace, images_N3HW)
        line["max_rel_diff"] = max_rel_diff(train_ours(workspace, TRAIN), reference.train(TRAIN))
        line["reference_s"] = min(_usual_participant(reference) for _ in range(3))
        line["ratio"] = line["reference_s"] / line["ours_s"]
        line["reference_ms"] = 1e3 * line["reference_s"]
    return line | {"ours_ms": 1e3 * line["ours_s"]}


def _usual_participant(reference: ReferencePieces) -> float:
    """Seconds of one participant's round in the reference: copy the model, train a step, test."""
    began = clock()
    for piece in (
        Piece("reference", "copy"),
        Piece("reference", "step", TRAIN),
        Piece("reference", "test", TEST),
    ):
        reference.run(piece)
    return clock() - began
