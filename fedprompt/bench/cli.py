"""The subcommands of `scripts/bench.py`: options, help texts and exit status."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fedprompt.runtime import set_defaults

# Before torch is imported, which reads them.
set_defaults()

import torch

from fedprompt.backbone.devices import ordered_sums, pick_device
from fedprompt.bench.backbones import random_clip
from fedprompt.bench.compare import MismatchError
from fedprompt.bench.output import Output
from fedprompt.config.schema import BackboneConfig
from fedprompt.errors import UserError
from fedprompt.runtime.endings import run_command

app = typer.Typer(
    help="Compare our implementation with a conventional one that gives equal results.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
JsonFile = Annotated[
    Path | None,
    typer.Option("--json", help="Also write the rows to this JSON file.", dir_okay=False),
]
Backbone = Annotated[str, typer.Option(help="Architecture: tiny, ViT-B-32, ViT-B-16 or ViT-L-14.")]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads; 0 uses all cores.")]
Repeats = Annotated[int, typer.Option(min=1, help="Largest number of repeats of a case.")]
Classes = Annotated[str, typer.Option(help="Numbers of classes, e.g. 10,45.")]
Context = Annotated[str, typer.Option(help="Numbers of context tokens, e.g. 4,16.")]
Device = Annotated[str, typer.Option(help="Device: auto, cpu, cuda or mps.")]
Ordered = Annotated[
    bool,
    typer.Option(
        "--deterministic", help="Compute as with backbone.deterministic; it shows the price."
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Images per training step.")]
ESTIMATED = (
    "promptfl,coop_csc,fedrsclip,vpt,maple,plot,fedotp,cocoop,tip_adapter,pfedprompt,pfedmma,"
    "fedmgp,proda"
)
"""Methods with different needs: text and image towers, transport plans, memories, adapters."""
Budget = Annotated[
    float, typer.Option(help="Seconds of a case after which no further repeat starts.")
]


@app.command()
def estimates(
    methods: Annotated[str, typer.Option(help="Methods, e.g. promptfl,vpt.")] = ESTIMATED,
    backbone: Backbone = "ViT-B-16",
    classes: Annotated[int, typer.Option(min=2, help="Number of classes.")] = 10,
    batch: BatchSize = 4,
    threads: Threads = 0,
    json: JsonFile = None,
) -> None:
    """Compare the estimated memory of a client's training step with the measured one."""
    from fedprompt.bench.estimates import EstimateOptions, bench_estimates

    out = _open("estimates", threads, json)
    names = [name.strip() for name in methods.split(",")]
    options = EstimateOptions(names, backbone, classes, images=batch, batch=batch)
    bench_estimates(options, out)


@app.command()
def methods(
    methods: Annotated[
        list[str] | None,
        typer.Argument(help="Methods, options behind the name: promptfl 'lora image_layers=12'."),
    ] = None,
    backbone: Backbone = "ViT-B-16",
    classes: Annotated[int, typer.Option(min=2, help="Number of classes.")] = 10,
    batch: BatchSize = 8,
    repeats: Repeats = 5,
    budget_s: Budget = 120.0,
    threads: Threads = 0,
    device: Device = "cpu",
    json: JsonFile = None,
) -> None:
    """Compare what a training step of one client costs with different methods, in seconds."""
    from fedprompt.bench.estimates import EstimateOptions
    from fedprompt.bench.methods import COMPARED, MethodsOptions, bench_methods

    out = _open("methods", threads, json, device)
    sizes = EstimateOptions((), backbone, classes, images=batch, batch=batch)
    chosen = methods or COMPARED
    bench_methods(MethodsOptions(chosen, sizes, repeats, budget_s, out.machine["device"]), out)


@app.command()
def step(
    classes: Classes = "10,45,50,100,345",
    context: Context = "4,16",
    batch: BatchSize = 8,
    backbone: Backbone = "ViT-B-16",
    repeats: Repeats = 3,
    budget_s: Budget = 30.0,
    threads: Threads = 0,
    device: Device = "cpu",
    deterministic: Ordered = False,
    json: JsonFile = None,
) -> None:
    """Measure a local training step, and its text part alone, in seconds per client."""
    # Each command imports its own module, so that --help and wrong input need not wait for Ray.
    from fedprompt.bench.step import StepOptions, bench_step

    out = _open("step", threads, json, device)
    options = StepOptions(numbers(classes), numbers(context), batch, repeats, budget_s)
    with ordered_sums(_backbone(device, deterministic=deterministic)):
        bench_step(random_clip(backbone, device=out.machine["device"]), options, out)


@app.command("round")
def round_(
    clients: Annotated[str, typer.Option(help="Numbers of clients, e.g. 10,100.")] = "10,100",
    classes: Annotated[int, typer.Option(min=2, help="Number of classes.")] = 100,
    shots: Annotated[
        int, typer.Option(min=1, help="Training images per class, all clients together.")
    ] = 8,
    tests: Annotated[int, typer.Option(min=1, help="Test images per class on the server.")] = 25,
    rounds: Annotated[int, typer.Option(min=1, help="Number of rounds.")] = 50,
    backbone: Backbone = "ViT-B-16",
    small: Annotated[
        str,
        typer.Option(
            help="Architecture for a small experiment that both implementations complete; '' "
            "leaves it out."
        ),
    ] = "ViT-B-32",
    repeats: Repeats = 2,
    threads: Threads = 0,
    device: Device = "cpu",
    json: JsonFile = None,
) -> None:
    """Measure a whole experiment with evaluation in every round, in seconds.

    The time to compute image features is included.
    """
    from fedprompt.bench.job import SMALL, few_shot_job
    from fedprompt.bench.round import bench_round

    out = _open("round", threads, json, device)
    jobs = [
        few_shot_job(n, classes=classes, shots=shots, tests=tests, rounds=rounds)
        for n in numbers(clients)
    ]
    on = out.machine["device"]
    bench_round(backbone, jobs, repeats, out, (small, SMALL) if small else None, on)


@app.command()
def overhead(
    clients: Annotated[
        str, typer.Option(help="Numbers of participants per round, e.g. 100,1000.")
    ] = "100,1000",
    workers: Annotated[
        str, typer.Option(help="Numbers of Ray workers; 0 runs the clients inline.")
    ] = "0,1,2",
    engine_clients: Annotated[
        int,
        typer.Option(
            min=0, help="Number of clients for which Flower's simulation engine runs too; 0: never."
        ),
    ] = 100,
    rounds: Annotated[
        int, typer.Option(min=1, help="Rounds to measure, after a first one that is not.")
    ] = 5,
    device: Device = "cpu",
    json: JsonFile = None,
) -> None:
    """Measure what a client costs besides its training, in milliseconds per client and round.

    Clients train a single step on two images, inline, on Ray and on Flower's simulation engine.
    """
    from fedprompt.bench.overhead import OverheadOptions, bench_overhead

    out = _open("overhead", 0, json, device)
    options = OverheadOptions(
        numbers(clients), numbers(workers, 0), (engine_clients,), rounds, out.machine["device"]
    )
    bench_overhead(options, out)


@app.command()
def scale(
    axes: Annotated[
        str, typer.Option(help="What grows: some of classes, methods, clients, images, runs.")
    ] = "classes,methods,clients,images,runs",
    methods: Annotated[
        str, typer.Option(help="Methods of the axis 'methods', e.g. promptfl,proda; '' for all.")
    ] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer and smaller sizes.")] = False,
    backbone: Backbone = "tiny",
    threads: Threads = 0,
    json: JsonFile = None,
) -> None:
    """Fit how positions, operations and bytes grow with classes, clients, images and runs."""
    from fedprompt.bench.scale import ScaleOptions, bench_scale

    out = _open("scale", threads, json)
    names = tuple(filter(None, methods.split(",")))
    bench_scale(ScaleOptions(tuple(axes.split(",")), names, backbone, quick), out)


@app.command()
def participants(
    clients: Annotated[
        str, typer.Option(help="Numbers of clients, e.g. 100,1000.")
    ] = "100,1000,10000",
    participants: Annotated[
        int, typer.Option(min=1, help="Clients that take part in a round.")
    ] = 100,
    methods: Annotated[
        str, typer.Option(help="Names of methods, e.g. promptfl,fedrsclip.")
    ] = "promptfl,fedrsclip",
    classes: Annotated[int, typer.Option(min=2, help="Number of classes.")] = 10,
    rounds: Annotated[int, typer.Option(min=3, help="Number of rounds.")] = 10,
    backbone: Backbone = "tiny",
    threads: Threads = 0,
    device: Device = "cpu",
    json: JsonFile = None,
) -> None:
    """Measure time per participant and peak memory for growing numbers of clients."""
    from fedprompt.bench.participants import ParticipantsOptions, bench_participants

    out = _open("participants", threads, json, device)
    names, on = tuple(methods.split(",")), out.machine["device"]
    options = ParticipantsOptions(
        numbers(clients), names, participants, rounds, classes, backbone, on
    )
    bench_participants(options, out)


@app.command()
def memory(
    backbone: Backbone = "ViT-B-16",
    classes: Annotated[int, typer.Option(min=2, help="Number of classes.")] = 100,
    context: Annotated[int, typer.Option(min=1, help="Number of context tokens.")] = 4,
    workers: Annotated[int, typer.Option(min=0, help="Number of Ray workers; 0: none.")] = 2,
    threads: Threads = 0,
    device: Device = "cpu",
    json: JsonFile = None,
) -> None:
    """Measure the peak memory of a process that runs a round, and of every Ray worker."""
    from fedprompt.bench.memory import MemoryOptions, bench_memory

    out = _open("memory", threads, json, device)
    on = out.machine["device"]
    bench_memory(MemoryOptions(backbone, classes, context, workers, on), out)


@app.command()
def placement(
    rounds: Annotated[int, typer.Option(min=2, help="Rounds per seed.")] = 20,
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions.")] = 30,
    json: JsonFile = None,
) -> None:
    """Simulated seconds per round: blocks placed by the Ray planner or longest first."""
    from fedprompt.bench.placement import PlacementOptions, bench_placement

    bench_placement(PlacementOptions(rounds, seeds), _open("placement", 0, json))


@app.command()
def limit(
    classes: Classes = "10,45,100",
    context: Annotated[int, typer.Option(min=1, help="Number of context tokens.")] = 4,
    batch: BatchSize = 8,
    backbone: Backbone = "ViT-B-16",
    repeats: Repeats = 10,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also show which operations take the remaining time.")
    ] = False,
    threads: Threads = 0,
    device: Device = "cpu",
    json: JsonFile = None,
) -> None:
    """Compare a training step with its matrix products alone, in seconds per client block."""
    from fedprompt.bench.limit import bench_limit

    out = _open("limit", threads, json, device)
    clip, counts = random_clip(backbone, device=out.machine["device"]), numbers(classes)
    bench_limit(clip, counts, context, batch, repeats, out, profile=profile)


@app.command()
def vision(
    prompts: Annotated[
        str, typer.Option(help="Prompt tokens x layers that have prompts, e.g. 4x1,8x12.")
    ] = "4x1,4x9,8x12",
    clients: Annotated[
        int, typer.Option(min=1, help="Number of clients that are computed together.")
    ] = 1,
    batch: BatchSize = 8,
    patches: Annotated[bool, typer.Option("--patches", help="Compute patch features too.")] = False,
    backbone: Backbone = "ViT-B-16",
    repeats: Repeats = 3,
    budget_s: Budget = 30.0,
    threads: Threads = 0,
    device: Device = "cpu",
    deterministic: Ordered = False,
    json: JsonFile = None,
) -> None:
    """Measure the image tower under visual prompts, forward and backward, in seconds per step."""
    from fedprompt.bench.vision import VisionOptions, bench_vision, prompt_shapes

    out = _open("vision", threads, json, device)
    shapes = prompt_shapes(prompts)
    options = VisionOptions(shapes, clients, batch, patches, repeats, budget_s)
    with ordered_sums(_backbone(device, deterministic=deterministic)):
        bench_vision(random_clip(backbone, device=out.machine["device"]), options, out)


@app.command()
def backbone(
    weights: Annotated[
        str, typer.Option(help="Formats of the weights, e.g. bf16,int8.")
    ] = "bf16,fp16,int8,int4",
    pruned: Annotated[
        float, typer.Option(min=0, max=0.99, help="Also measure a model pruned by this fraction.")
    ] = 0.5,
    backbone: Backbone = "ViT-B-16",
    classes: Annotated[int, typer.Option(min=2, help="Number of classes.")] = 10,
    context: Annotated[int, typer.Option(min=1, help="Number of context tokens.")] = 4,
    batch: Annotated[int, typer.Option(min=1, help="Images that are encoded at once.")] = 8,
    images_per_class: Annotated[
        int, typer.Option(min=2, help="Embedded images per class and domain.")
    ] = 20,
    repeats: Repeats = 3,
    budget_s: Budget = 60.0,
    threads: Threads = 0,
    device: Device = "cpu",
    json: JsonFile = None,
) -> None:
    """Compare weights in fewer bits with float32: accuracy, memory, and seconds per pass."""
    from fedprompt.bench.precision import PrecisionOptions, bench_precision, forms

    out = _open("backbone", threads, json, device)
    options = PrecisionOptions(
        forms(weights, pruned),
        backbone,
        classes,
        context,
        batch,
        images_per_class,
        repeats,
        budget_s,
        out.machine["device"],
    )
    bench_precision(options, out)


@app.command()
def encode(
    images: Annotated[int, typer.Option(min=1, help="Number of images.")] = 256,
    size: Annotated[int, typer.Option(min=16, help="Height and width of the files.")] = 256,
    backbone: Backbone = "ViT-B-16",
    repeats: Repeats = 3,
    threads: Threads = 0,
    device: Device = "cpu",
    json: JsonFile = None,
) -> None:
    """Measure images per second from files on the disk to cached features, and from the cache."""
    from fedprompt.bench.encode import EncodeOptions, bench_encode

    out = _open("encode", threads, json, device)
    clip = random_clip(backbone, device=out.machine["device"])
    bench_encode(clip, EncodeOptions(images, size, repeats), out)


@app.command()
def sweep(
    runs: Annotated[int, typer.Option(min=8, help="Number of runs, a multiple of 8.")] = 24,
    rounds: Annotated[int, typer.Option(min=1, help="Number of rounds.")] = 30,
    images_per_class: Annotated[int, typer.Option(min=2, help="Images per class and domain.")] = 60,
    device: Device = "cpu",
    json: JsonFile = None,
) -> None:
    """Compare a sweep on the embedded data with the same runs one after another, in seconds."""
    from fedprompt.bench.sweep import SweepOptions, bench_sweep

    out = _open("sweep", 0, json, device)
    bench_sweep(SweepOptions(runs, rounds, images_per_class, out.machine["device"]), out)


def numbers(text: str, least: int = 1) -> tuple[int, ...]:
    """Parse numbers: `10,45` -> (10, 45).

    Raises:
        UserError: `text` is not a list of whole numbers of at least `least`, separated by commas.
    """
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or min(values) < least:
        raise UserError(
            f"'{text}': give whole numbers of at least {least}, separated by commas, e.g. 10,45."
        )
    return values


def main() -> None:
    """Entry point. Wrong input exits with status 2, results that differ with 1, after one line."""
    run_command(_command, "bench")


def _command() -> None:
    try:
        app(standalone_mode=True)
    except MismatchError as error:
        sys.stderr.write(f"bench: {error}\n")
        sys.exit(1)
    except UserError as error:
        sys.stderr.write(f"bench: {error}\n")
        sys.exit(2)


def _backbone(device: str, *, deterministic: bool) -> BackboneConfig:
    # `_open` has refused other devices.
    return BackboneConfig(device=device, deterministic=deterministic)  # type: ignore[arg-type]


def _open(command: str, threads: int, json: Path | None, device: str = "cpu") -> Output:
    """Set the number of threads, choose the device, and print the header."""
    if threads:
        torch.set_num_threads(threads)
    return Output(command, json, pick_device(device))
