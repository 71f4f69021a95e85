"""Memory of one process that runs a whole round, and of every Ray worker.

Each measurement is a fresh process that opens the same experiment from disk, with memory-mapped
weights. Resident memory includes the libraries and the mapped weights; private memory is what a
process shares with no other (smaps_rollup: Private_Clean + Private_Dirty).
"""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedprompt.backbone.loading import load_clip
from fedprompt.bench.backbones import encode_all, random_clip, random_images, save_weights
from fedprompt.bench.class_lists import class_names
from fedprompt.bench.compare import clock, max_rel_diff, require_equal
from fedprompt.bench.disk_job import write_job
from fedprompt.bench.isolated import in_fresh_process
from fedprompt.bench.machine import peak_mb, private_mb
from fedprompt.bench.output import Column, Output
from fedprompt.bench.pieces import ReferencePieces, train_ours
from fedprompt.bench.workload import Sizes, make_workspace
from fedprompt.config.schema import Config
from fedprompt.data import open_dataset
from fedprompt.experiment.workspaces import open_workspace
from fedprompt.federation.server_app import Federation
from fedprompt.simulation.grids import open_grid
from fedprompt.simulation.ray_grid import RayGrid

COLUMNS: tuple[Column, ...] = (
    ("case", "case", ""),
    ("peak MB", "peak_mb", ".0f"),
    ("private MB", "private_mb", ".0f"),
    ("libraries MB", "libraries_mb", ".0f"),
    ("private", "libraries_private_mb", ".0f"),
    ("reference peak MB", "reference_peak_mb", ".0f"),
    ("memory ratio", "memory_ratio", ".1f"),
    ("ours s", "ours_s", ".3g"),
    ("reference s", "reference_s", ".3g"),
    ("max rel. diff", "max_rel_diff", ".1e"),
)
IMAGES, CLIENTS = 8, 8


@dataclass(frozen=True)
class MemoryOptions:
    """What `bench memory` measures."""

    backbone: str = "ViT-B-16"
    classes: int = 100
    context: int = 4
    workers: int = 2
    device: str = "cpu"


def bench_memory(options: MemoryOptions, out: Output) -> None:
    """Measure a process with the inline grid, one with the reference, and Ray workers.

    Args:
        options: what to measure.
        out: where rows and notes go.

    Raises:
        MismatchError: a client's loss or prompts differ from the reference's.
    """
    with tempfile.TemporaryDirectory(prefix="fedprompt-bench-") as name:
        config = write_experiment(Path(name), options)
        out.progress("one process, inline grid, whole round")
        ours = in_fresh_process(inline_round, config)
        out.progress("the reference: one client's step")
        reference = in_fresh_process(reference_step, config)
        case = f"one process, {options.classes} classes"
        require_equal(case, reference["max_rel_diff"])
        out.add({"case": case, **ours, **reference, **_ratios(ours, reference)})
        if options.workers:
            out.progress(f"{options.workers} Ray workers")
            for worker in in_fresh_process(ray_round, config, options.workers):
                line = {"reference_s": None, "ratio": None, "max_rel_diff": None}
                out.add({"ours_s": None, **line, **worker})
    out.table(COLUMNS)
    out.note(
        "Peak: VmHWM of a fresh process, including mapped weights and libraries. Seconds: training "
        "of one client in the round."
    )


def write_experiment(folder: Path, options: MemoryOptions) -> Config:
    """Write the experiment, with random weights unless the backbone is the embedded one.

    Args:
        folder: an empty folder for images, cache, weights and the run folder.
        options: backbone, number of classes and context tokens.

    Returns:
        The config that opens the experiment.
    """
    backbone: dict[str, Any] = {"model": options.backbone, "device": options.device}
    if options.backbone != "tiny":
        backbone["checkpoint"] = str(folder / "weights.safetensors")
        save_weights(random_clip(options.backbone), folder / "weights.safetensors")
    return write_job(
        folder,
        class_names(options.classes),
        Sizes(CLIENTS, IMAGES, 2, 2 * options.classes),
        backbone=backbone,
        method={"name": "promptfl", "context_tokens": options.context},
        federation={"rounds": 2},
    )


def _ratios(ours: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    peak, usual = ours["peak_mb"], reference["reference_peak_mb"]
    return {
        "ratio": reference["reference_s"] / ours["ours_s"],
        "memory_ratio": usual / peak if peak and usual else None,
    }


def inline_round(config: Config) -> dict[str, Any]:
    """Run a round with evaluation in this process, and measure its memory."""
    # Read before anything is loaded: the share of PyTorch and the other libraries alone.
    libraries = {"libraries_mb": peak_mb(), "libraries_private_mb": private_mb()}
    workspace = open_workspace(config)
    federation = Federation(workspace, open_grid(config, workspace, open_workspace))
    federation.join()
    began = clock()
    federation.train_round(1)
    seconds = clock() - began
    federation.evaluate(1)
    return {
        "ours_s": seconds / CLIENTS,
        "peak_mb": peak_mb(),
        "private_mb": private_mb(),
        **libraries,
    }


def reference_step(config: Config) -> dict[str, Any]:
    """Train one client as public code does: a copy of the model, one step of 8 images."""
    clip = load_clip(config.backbone, Path(config.output.cache or ""))
    names = open_dataset(config.data, config.seed, Path(config.output.cache or "")).class_names
    images_N3HW = random_images(clip, IMAGES, seed=0)
    method = {"name": "promptfl", "context_tokens": config.method.context_tokens}
    features_ND = encode_all(clip, images_N3HW)
    workspace = make_workspace(clip, names, Sizes(1, IMAGES), features_ND, method=method)
    reference = ReferencePieces(workspace, images_N3HW)
    began = clock()
    server = reference.model
    # Public code copies the whole model for every client, so the peak contains both.
    reference.model = copy.deepcopy(server)
    trained = reference.train(IMAGES)
    seconds = clock() - began
    # Read before the comparison below, which would add to the peak.
    peak = peak_mb()
    difference = max_rel_diff(train_ours(workspace, IMAGES), trained)
    return {"reference_s": seconds, "reference_peak_mb": peak, "max_rel_diff": difference}


def ray_round(config: Config, workers: int) -> list[dict[str, Any]]:
    """Run a round on Ray, and measure the memory of every worker after it."""
    config = replace(config, simulation=replace(config.simulation, kind="ray", workers=workers))
    grid = open_grid(config, open_workspace(config), open_workspace)
    assert isinstance(grid, RayGrid)
    try:
        federation = Federation(grid.workspace, grid)
        federation.join()
        federation.train_round(1)
        federation.evaluate(1)
        return [
            {
                "case": f"Ray worker {number + 1} of {workers}",
                "peak_mb": peak_mb(process),
                "private_mb": private_mb(process),
            }
            for number, process in enumerate(grid.pids())
        ]
    finally:
        grid.close()
