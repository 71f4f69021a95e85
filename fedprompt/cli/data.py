"""The `fedprompt data` commands: the catalogue, partitions and contact sheets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, Group

from fedprompt.cli.completion import (
    complete_dataset,
    complete_experiment,
    complete_override,
    complete_shown,
)
from fedprompt.errors import UserError, did_you_mean
from fedprompt.reports.terminal import fields, fitted

if TYPE_CHECKING:
    from fedprompt.config.schema import Config
    from fedprompt.data.catalogue import Entry
    from fedprompt.data.dataset import ImageDataset
    from fedprompt.data.partition import Partition

PLAIN: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}
"""Print text as it is: paths may contain brackets, and a copied line must not be wrapped."""
data_app = typer.Typer(help="Inspect data sets and partitions.", no_args_is_help=True)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Changes to the config, e.g. federation.rounds=20 method=promptfl seed=2",
        metavar="[KEY=VALUE]...",
        autocompletion=complete_override,
    ),
]
Name = Annotated[
    str,
    typer.Argument(
        help="A data set of the catalogue.", metavar="NAME", autocompletion=complete_dataset
    ),
]
Experiment = Annotated[
    str,
    typer.Argument(help="A shipped experiment or a YAML file.", autocompletion=complete_experiment),
]
SplitFrom = Annotated[
    str, typer.Option("--split", help="auto, coop (CoOp's split file) or official.")
]


@data_app.command("list")
def list_datasets() -> None:
    """List the data sets of the catalogue."""
    from fedprompt.data import catalogue

    console = Console()
    entries = [catalogue.entry(name) for name in catalogue.names()]
    for kind in sorted({entry.kind for entry in entries}, reverse=True):
        console.print(_entries(kind, [e for e in entries if e.kind == kind], console.width))
    console.print(
        "hub: yes, or ? if the copy could not be checked. data=NAME loads the copy on the hub,\n"
        "data=NAME data.root=DIR the authors' folder. Details: fedprompt data show NAME.",
        **PLAIN,
    )


def _entries(kind: str, entries: Sequence[Entry], width: int) -> Group:
    """Lay out data sets of one kind, one row each.

    Args:
        kind: The kind, which is the title.
        entries: The entries of the catalogue.
        width: Width of the terminal, in characters; licences are shown if it is at least 110.
    """
    rows = []
    for entry in entries:
        hub = "-" if entry.hub is None else "yes" if entry.hub.verified else "?"
        metres = entry.metres_per_pixel or "-"
        facts = (f"{entry.images:,}", str(entry.num_classes), hub, entry.size, metres)
        rows.append((entry.name, *facts, entry.licence))
    heads = ("name", "images", "classes", "hub", "size", "m/pixel", "licence")
    most = {"size": 24, "licence": max(20, width - 90)}
    name, *columns = fields(heads, rows, left=heads[3:], most=most)
    # A column in which no data set of this kind has a value is left out.
    bare = [field.head for field in columns if all(cell.plain == "-" for cell in field.cells)]
    dropped = (*bare, *(() if width >= 110 else ("licence",)))
    columns = [field for field in columns if field.head not in dropped]
    return fitted(name, columns, width, title=kind)


@data_app.command()
def show(
    what: Annotated[
        str,
        typer.Argument(
            help="A data set of the catalogue, a shipped experiment or a YAML file.",
            metavar="NAME_OR_EXPERIMENT",
            autocompletion=complete_shown,
        ),
    ],
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option("--out", help="File for the plot.")] = Path("partition.png"),
) -> None:
    """Print the entry of a data set, or print and plot the partition of an experiment."""
    from fedprompt.data import catalogue
    from fedprompt.data.sections import available

    if what in catalogue.names() and what not in available("experiment"):
        if overrides:
            raise UserError(f"'{what}' is a data set; only an experiment takes changes.")
        _show_entry(what)
        return
    if what not in available("experiment") and not what.endswith((".yaml", ".yml")):
        hint = did_you_mean(what, [*available("experiment"), *catalogue.names()])
        raise UserError(f"no experiment or data set {what!r}.{hint}")
    _show_partition(what, overrides or [], out)


@data_app.command()
def check(
    name: Name,
    root: Annotated[Path, typer.Option("--root", help="The folder with the authors' copy.")],
    split: SplitFrom = "auto",
) -> None:
    """Compare a folder with the catalogue; the exit status is 1 if they differ."""
    from fedprompt.data import catalogue
    from fedprompt.data import check_copy as checking

    found = catalogue.entry(name)
    finding = checking.check(found, root, _split(split))
    rows = []
    for row in finding.rows:
        stated = "" if row.stated is None else f"{row.stated:,}"
        verdict = "" if row.stated is None else "ok" if row.ok else "differs"
        rows.append((row.what, stated, f"{row.found:,}", verdict))
    console = Console()
    what, *columns = fields(("", "stated", "found", "verdict"), rows, left=("verdict",))
    title = f"{name}: split: {finding.split_source}"
    console.print(fitted(what, columns, console.width, title=title))
    for problem in finding.problems:
        console.print(problem, **PLAIN)
    if not finding.ok:
        console.print(f"{root} differs from the catalogue's {name}", **PLAIN)
        raise typer.Exit(1)


@data_app.command()
def prepare(
    name: Name,
    root: Annotated[
        Path | None, typer.Option("--root", help="The folder with the authors' copy.")
    ] = None,
    from_hub: Annotated[
        bool, typer.Option("--hub", help="Load the copy on the hub, which may download it.")
    ] = False,
    split: SplitFrom = "auto",
    cache: Annotated[
        Path | None, typer.Option("--cache", help="Feature cache, as output.cache in a config.")
    ] = None,
) -> None:
    """Read every image once and report those that cannot be read; later runs skip this check."""
    from fedprompt.data import catalogue, open_dataset
    from fedprompt.data.cache_files import default_cache_dir
    from fedprompt.data.dataset import TEST, TRAIN
    from fedprompt.data.sources.registry import build_data

    if from_hub == (root is not None):
        raise UserError("give --root DIR for the authors' folder, or --hub for the hub's copy.")
    # on_bad_image=skip: the default stops at the first unreadable image, and here all are reported.
    keys = catalogue.data_keys(catalogue.entry(name).name)
    keys |= {"root": None if root is None else str(root), "split": _split(split)}
    config = build_data({**keys, "on_bad_image": "skip"})
    dataset = open_dataset(config, 1, default_cache_dir(None if cache is None else str(cache)))
    console = Console()
    counts = {code: int((dataset.split_N == code).sum()) for code in (TRAIN, TEST)}
    console.print(
        f"{name}: {len(dataset):,} images of {len(dataset.class_names)} classes and "
        f"{len(dataset.domain_names)} domain(s) can be read: {counts[TRAIN]:,} training, "
        f"{counts[TEST]:,} test",
        **PLAIN,
    )
    for bad in dataset.bad_images:
        console.print(f"unreadable: {bad.where}: {bad.reason}", **PLAIN)
    if dataset.bad_images:
        console.print(
            f"{len(dataset.bad_images)} unreadable; replace them, or set data.on_bad_image=skip",
            **PLAIN,
        )


@data_app.command()
def partition(
    experiment: Experiment,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option("--out", help="File to write.")] = Path("partition.json"),
) -> None:
    """Write the partition of an experiment to a file, for partition.file=FILE."""
    from fedprompt.data.partition.file import origin_of, write_partition
    from fedprompt.experiment.compose import compose

    config = compose(experiment, overrides or [])
    dataset, made = _dealt(config)
    write_partition(out, dataset, made, origin_of(config.partition, config.seed))
    Console().print(f"wrote {out}", **PLAIN)


@data_app.command()
def sheet(
    experiment: Experiment,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option("--out", help="File for the picture.")] = Path("sheet.png"),
) -> None:
    """Draw a contact sheet of a data set: one row per class, images of all domains."""
    from PIL.PngImagePlugin import PngInfo

    from fedprompt.cli.data_views import contact_sheet
    from fedprompt.data import open_dataset
    from fedprompt.data.cache_files import default_cache_dir
    from fedprompt.experiment.compose import compose
    from fedprompt.files import refuse_foreign
    from fedprompt.reports.draw import MARK, SOURCE

    config = compose(experiment, overrides or [])
    dataset = open_dataset(config.data, config.seed, default_cache_dir(config.output.cache))
    refuse_foreign(out, MARK)
    tags = PngInfo()
    tags.add_text("Source", SOURCE)
    try:
        contact_sheet(dataset).save(out, pnginfo=tags)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {out}: {error}.") from None
    Console().print(f"wrote {out}", markup=False, highlight=False)


def _dealt(config: Config) -> tuple[ImageDataset, Partition]:
    """Return the data set, without what a protocol holds out, and its partition, as in a run."""
    from fedprompt.data import open_dataset
    from fedprompt.data.cache_files import default_cache_dir
    from fedprompt.experiment.workspaces import deal

    dataset = open_dataset(config.data, config.seed, default_cache_dir(config.output.cache))
    dataset, _, partition = deal(config, dataset)
    return dataset, partition


def _show_partition(experiment: str, overrides: list[str], out: Path) -> None:
    from fedprompt.cli.data_views import partition_table
    from fedprompt.data.partition import describe
    from fedprompt.experiment.compose import compose
    from fedprompt.reports.partition_figure import plot_partition

    config = compose(experiment, overrides)
    dataset, made = _dealt(config)
    description = describe(dataset, made)
    console = Console()
    console.print(partition_table(dataset.name, description, console.width))
    for note in dataset.notes:
        console.print(note, markup=False, highlight=False)
    for bad in dataset.bad_images:
        console.print(f"skipped {bad.where}: {bad.reason}", markup=False, highlight=False)
    try:
        plot_partition(description, out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}.") from None
    console.print(f"wrote {out}", markup=False, highlight=False)


def _show_entry(name: str) -> None:
    import yaml

    from fedprompt.data.catalogue import entry, facts

    text = yaml.safe_dump(facts(entry(name)), sort_keys=False, allow_unicode=True, width=100)
    Console().print(text, markup=False, highlight=False, soft_wrap=True, end="")


def _split(name: str) -> str:
    if name not in ("auto", "coop", "official"):
        raise UserError(f"--split is {name!r}; it must be auto, coop or official.")
    return name
