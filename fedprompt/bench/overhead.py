"""What a client costs in a round besides its training: sampling, messages, grid, aggregation.

The embedded tiny CLIP, two classes, two images and one step per client, so that training is short.
Nothing is subtracted: the time of training the same blocks in this process is reported beside the
whole.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from fedprompt.bench.compare import Measured, clock, max_rel_diff, require_equal, row
from fedprompt.bench.disk_job import write_job
from fedprompt.bench.flower_engine import available, run_engine, training_seconds
from fedprompt.bench.machine import peak_mb
from fedprompt.bench.output import Column, Output
from fedprompt.bench.workload import Sizes
from fedprompt.config.schema import Config
from fedprompt.experiment.workspaces import open_workspace
from fedprompt.federation.server_app import Federation
from fedprompt.reports.run_data import PROMPTS
from fedprompt.runtime.peak_memory import reset_peak_memory
from fedprompt.simulation.block_grid import BlockGrid
from fedprompt.simulation.blocks import group
from fedprompt.simulation.grids import open_grid
from fedprompt.training import train_clients
from fedprompt.workspace import Workspace

CLASSES = ("forest", "river")
IMAGES = 2
COLUMNS: tuple[Column, ...] = (
    ("case", "case", ""),
    ("ours ms", "ours_ms", ".3f"),
    ("of it training ms", "training_ms", ".3f"),
    ("Flower ms", "reference_ms", ".1f"),
    ("ratio", "ratio", ".1f"),
    ("max rel. diff", "max_rel_diff", ".1e"),
    ("MB", "peak_mb", ".0f"),
)


@dataclass(frozen=True)
class OverheadOptions:
    """What `bench overhead` measures; 0 workers mean the inline grid."""

    clients: Sequence[int] = (100, 1000)
    workers: Sequence[int] = (0, 1, 2)
    engine_clients: Sequence[int] = (100,)
    rounds: int = 5
    device: str = "cpu"


def bench_overhead(options: OverheadOptions, out: Output) -> None:
    """Measure every grid; their results must agree.

    Raises:
        MismatchError: a grid's final prompts differ from those of the first one.
    """
    for clients in options.clients:
        with tempfile.TemporaryDirectory(prefix="fedprompt-bench-") as name:
            _bench(Path(name), clients, options, out)
    out.table(COLUMNS)


def _bench(folder: Path, clients: int, options: OverheadOptions, out: Output) -> None:
    config = write_job(
        folder,
        CLASSES,
        Sizes(clients, IMAGES, server_test=2),
        invent_features=False,
        method={"name": "promptfl", "context_tokens": 4},
        federation={"rounds": options.rounds + 1},
        # Evaluated only after the last round, because training alone is measured.
        evaluation={"every": options.rounds + 1},
        simulation={"threads": 1},
        backbone={"device": options.device},
    )
    workspace = open_workspace(config)
    reference: Measured | None = None
    expected: Tensor | None = None
    if clients in options.engine_clients and available():
        out.progress(f"{clients} clients on Flower's engine (flwr run)")
        run = run_engine(config, folder / "engine")
        expected = load_file(run / PROMPTS)["shared/ctx"]
        # The first round includes the start of Flower's clients.
        reference = Measured(seconds=[s / clients for s in training_seconds(run)[1:]])
    for workers in options.workers:
        name = f"{'inline' if not workers else f'Ray, {workers} workers'}, {clients} clients"
        out.progress(name)
        measured, context, training_s = _rounds(workspace, config, workers, options.rounds)
        if expected is None:
            expected, difference = context, None
        else:
            difference = max_rel_diff({"ctx": context}, {"ctx": expected})
            require_equal(name, difference)
        line = row(name, measured, reference, difference=difference, clients=clients)
        line |= {"ours_ms": 1e3 * line["ours_s"], "training_ms": 1e3 * training_s}
        line["reference_ms"] = 1e3 * reference.best if reference else None
        out.add(line | {"workers": workers})


def _rounds(
    workspace: Workspace, config: Config, workers: int, rounds: int
) -> tuple[Measured, Tensor, float]:
    """Measure the rounds on one kind of grid.

    Returns:
        Seconds per client of each round after the first, which includes the start of the workers;
        the final context; and seconds per client of the training alone.
    """
    grid_config = replace(
        config.simulation, kind="ray" if workers else "inline", workers=max(1, workers)
    )
    threads = torch.get_num_threads()
    config = replace(config, simulation=grid_config)
    reset_peak_memory()
    # The grid works on the changed config; data and CLIP are shared.
    w = workspace
    grid = open_grid(
        config, Workspace(config, w.clip, w.dataset, w.partition, w.views), open_workspace
    )
    try:
        federation = Federation(grid.workspace, grid)
        federation.join()
        measured = Measured()
        for server_round in range(1, rounds + 2):
            start = clock()
            federation.train_round(server_round)
            # The first round includes the start of the workers.
            if server_round > 1:
                measured.seconds.append((clock() - start) / workspace.num_clients)
        measured.peak_mb = peak_mb()
        return measured, federation.shared["ctx"], _training_alone(grid)
    finally:
        grid.close()
        torch.set_num_threads(threads)


def _training_alone(grid: BlockGrid) -> float:
    """Seconds per client of `train_clients` on the grid's blocks, in this process."""
    workspace, config = grid.workspace, grid.workspace.config
    start = workspace.method.init_shared(config.seed)
    clients = range(workspace.num_clients)
    blocks = group(workspace, clients, grid.clients_per_block(len(clients)))
    seconds = []
    # The fastest of three, as `best` of the measured rounds.
    for _ in range(3):
        began = clock()
        for block in blocks:
            train_clients(
                workspace.method,
                [start] * len(block),
                [{}] * len(block),
                [workspace.train_data(c) for c in block],
                config.training,
                seed=config.seed,
                server_round=1,
                rounds=config.federation.rounds,
            )
        seconds.append(clock() - began)
    return min(seconds) / len(clients)
