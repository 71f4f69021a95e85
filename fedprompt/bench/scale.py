"""The growth laws: what classes, clients, images and runs cost as their number grows.

Costs are counted, not timed, wherever they can be: positions that pass through the towers, 10^9
floating-point operations, and the largest number of bytes that exist at once. Each axis does the
smallest piece of work whose cost grows:

- `classes`, `methods`: one client's round of one step (PromptFL, and every method);
- `clients`: a federation is partitioned and joined, and ten of its clients train a round;
- `images`: labels are partitioned among a hundred clients. No image file is read: a scan and an
  encoding do the same for every image by construction;
- `runs`: a sweep over seeds is planned, to the complete config of every run.

Bytes are those of tensors on the first two axes, and those of Python and NumPy on the others. Of
the positions, one client's alone are counted.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import process_time
from typing import Any

import torch
import torch.nn.functional as F

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.layer_statistics import StatisticsEncoder
from fedprompt.backbone.vision_tower import VisionTower
from fedprompt.bench.backbones import random_clip
from fedprompt.bench.class_lists import QUICK_DRAW
from fedprompt.bench.compare import Row
from fedprompt.bench.counting import count_gflop
from fedprompt.bench.growth import fit
from fedprompt.bench.output import Column, Output
from fedprompt.bench.workload import Sizes, make_dataset, make_workspace, settings
from fedprompt.config.fields import build
from fedprompt.config.schema import TrainingConfig
from fedprompt.data.features.inputs import Inputs
from fedprompt.data.partition import make_partition
from fedprompt.errors import UserError, did_you_mean
from fedprompt.federation.server_app import Federation
from fedprompt.methods.base import ClientData, Task
from fedprompt.methods.registry import all_methods, method_class
from fedprompt.runtime.allocations import Allocations
from fedprompt.simulation.inline_grid import InlineGrid
from fedprompt.sweeps.plan import Resources, SweepFile, expand
from fedprompt.training import train_clients

COSTS = ("positions", "gflop", "peak_mb", "seconds")
COLUMNS: tuple[Column, ...] = (
    ("case", "case", ""),
    ("sizes", "sizes", ""),
    ("positions", "positions", ",.0f"),
    ("~", "positions_exponent", ".2f"),
    ("GFLOP", "gflop", ".3g"),
    ("~", "gflop_exponent", ".2f"),
    ("peak MB", "peak_mb", ".3g"),
    ("~", "peak_mb_exponent", ".2f"),
    ("CPU s", "seconds", ".3g"),
    ("~", "seconds_exponent", ".2f"),
    ("worst residual", "residual", ".0%"),
)
BATCH = 8
PARTICIPANTS = 10
POINTS: dict[str, tuple[int, ...]] = {
    "classes": (10, 32, 100, 316, 1000),
    "methods": (10, 32, 100),
    "clients": (10, 100, 1000, 10_000, 100_000),
    "images": (1000, 10_000, 100_000, 1_000_000),
    "runs": (10, 100, 500, 2000),
}
"""The sizes of every axis; on `methods` they are classes."""
QUICK: dict[str, tuple[int, ...]] = {
    "classes": (10, 32, 100),
    "methods": (10, 32),
    "clients": (10, 100, 1000),
    "images": (1000, 10_000, 100_000),
    "runs": (10, 30, 100),
}


@dataclass(frozen=True)
class ScaleOptions:
    """What `bench scale` measures: some of the axes, and which methods on the axis `methods`."""

    axes: Sequence[str] = tuple(POINTS)
    methods: Sequence[str] = ()
    backbone: str = "tiny"
    quick: bool = False


def bench_scale(options: ScaleOptions, out: Output) -> None:
    """Measure every axis, and fit the exponents.

    Raises:
        UserError: an axis or a method is not known.
    """
    for axis in options.axes:
        if axis not in POINTS:
            raise UserError(f"--axes {axis}: not known.{did_you_mean(axis, tuple(POINTS))}")
    names = options.methods or list(all_methods())
    for name in names:
        method_class(name)  # an unknown name is refused before anything is measured
    clip = random_clip(options.backbone)
    cases: dict[str, dict[str, Callable[[int], Row]]] = {
        "classes": {"classes, promptfl": lambda n: step_cost(clip, "promptfl", n)},
        "methods": {f"classes, {m}": _of_method(clip, m) for m in names},
        "clients": {"clients": lambda n: round_cost(clip, n)},
        "images": {"images": partition_cost},
        "runs": {"runs": plan_cost},
    }
    for axis in options.axes:
        sizes = (QUICK if options.quick else POINTS)[axis]
        for case, cost in cases[axis].items():
            out.progress(f"{case}: {', '.join(f'{n:,}' for n in sizes)}")
            cost(sizes[0])  # warms up, which would hide the growth of the seconds
            out.add(growth_row(case, sizes, [cost(n) for n in sizes]))
    out.table(COLUMNS)
    out.note(
        "Costs are those of the largest size; ~ is the exponent of the size, fitted to all of them "
        "by least squares of the logarithms. The residual is the largest of a row's counted costs."
    )


def growth_row(case: str, sizes: Sequence[int], costs: Sequence[Row]) -> Row:
    """One row: the costs at the largest size, the exponents, and all points.

    Args:
        case: what grows.
        sizes: the sizes, ascending.
        costs: what each of them costs, by `COSTS`; None where a cost does not apply.
    """
    row: Row = {"case": case, "sizes": f"{sizes[0]:,} .. {sizes[-1]:,} ({len(sizes)})"}
    residuals = []
    for name in COSTS:
        values = [cost[name] for cost in costs]
        row[name] = values[-1]
        law = None if None in values else fit(sizes, values)
        row[f"{name}_exponent"] = law and law.exponent
        row[f"{name}_law"] = law and asdict(law)
        # Times vary with the machine, so they are not held against the laws of what is counted.
        if law is not None and name != "seconds":
            residuals.append(law.residual)
    row["residual"] = max(residuals, default=None)
    row["points"] = [{"size": n, **cost} for n, cost in zip(sizes, costs, strict=True)]
    return row


def many_classes(count: int) -> tuple[str, ...]:
    """Names for up to 1,035 classes: those of Quick, Draw!, and again with an adjective."""
    names = [f"{a} {name}".strip() for a in ("", "small", "old") for name in QUICK_DRAW]
    return tuple(names[:count])


def step_cost(clip: FrozenCLIP, name: str, classes: int) -> Row:
    """A client's round of one step on `BATCH` images."""
    cls = method_class(name)
    method = cls(build(cls.Config, {"name": name}, "method"), clip, Task(many_classes(classes)))
    data = ClientData(0, _inputs(clip, BATCH), torch.arange(BATCH) % classes)
    private = method.init_private_from_data(method.init_private(1, 0), data, 1)
    received = method.init_shared(1) | method.init_extras(1)
    config = TrainingConfig(batch_size=BATCH)

    def step() -> None:
        if method.trainable:
            train_clients(
                method, [received], [private], [data], config, seed=1, server_round=1, rounds=10
            )

    before, began = clip.positions_encoded, process_time()
    step()
    seconds, positions = process_time() - began, clip.positions_encoded - before
    with Allocations() as made:
        step()
    return _row(positions, count_gflop(step), made.peak, seconds)


def round_cost(clip: FrozenCLIP, clients: int) -> Row:
    """A federation from its partition to a round of `PARTICIPANTS`, two images per client."""

    def train() -> None:
        workspace = make_workspace(
            clip,
            many_classes(10),
            Sizes(clients, 2, 0, 10),
            federation={"rounds": 1, "fraction": PARTICIPANTS / clients},
        )
        federation = Federation(workspace, InlineGrid(workspace))
        federation.join()
        federation.train_round(1)

    before = clip.positions_encoded
    gflop = count_gflop(train)
    positions = clip.positions_encoded - before
    return _row(positions, gflop, *_traced(train))


def partition_cost(images: int) -> Row:
    """The partition of labels among a hundred clients, Dirichlet."""
    dataset = make_dataset(many_classes(10), images, images)
    config = settings(100, partition={"scheme": "dirichlet", "alpha": 1.0}).partition
    return _row(None, None, *_traced(lambda: make_partition(dataset, config, 1)))


def plan_cost(runs: int) -> Row:
    """The plan of a sweep of one row and many seeds."""
    sweep = SweepFile(
        name="bench",
        path=Path("bench.yaml"),
        experiment="label_skew",
        seeds=tuple(range(1, runs + 1)),
        common=(),
        rows={},
        grid={},
        resources=Resources(),
    )
    return _row(None, None, *_traced(lambda: expand(sweep, Path("runs"))))


def _of_method(clip: FrozenCLIP, name: str) -> Callable[[int], Row]:
    return lambda classes: step_cost(clip, name, classes)


def _traced(call: Callable[[], Any]) -> tuple[int, float]:
    """The largest number of bytes of Python and NumPy during a call, and its CPU seconds."""
    began = process_time()
    call()
    seconds = process_time() - began
    # A second call, because tracing takes several times as long as the work.
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1], seconds
    finally:
        tracemalloc.stop()


def _row(positions: int | None, gflop: float | None, peak: int, seconds: float) -> Row:
    return {"positions": positions, "gflop": gflop, "peak_mb": peak / 1e6, "seconds": seconds}


def _inputs(clip: FrozenCLIP, count: int) -> Inputs:
    """Random images with everything that a method may need."""
    draws = torch.Generator().manual_seed(0)
    visual: Any = clip.model.visual
    shape = (count, VisionTower(clip).patches, clip.embed_dim)
    patches = F.normalize(torch.randn(*shape, generator=draws), dim=-1)
    features = F.normalize(torch.randn(count, clip.embed_dim, generator=draws), dim=-1)
    pixels = torch.randint(256, (count, 3, *visual.image_size), generator=draws, dtype=torch.uint8)
    statistics = torch.rand(count, *StatisticsEncoder(clip).shape, generator=draws)
    norms = torch.ones(count)
    return Inputs(features, patches, pixels, clip.mean_std, norms, statistics=statistics)
