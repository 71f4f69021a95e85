"""From a sweep file to planned runs, each with its complete config and its own folder.

    name: my_table                    of the sweep and its folder in runs/ [the file's name]
    experiment: benchmark             a shipped experiment, or a YAML file (also beside this one)
    seeds: [1, 2, 3]
    common: [federation.rounds=20]    overrides of all runs
    rows:                             named lists of overrides: the rows of a table
      PromptFL: [method=promptfl]
      FedRSCLIP: []
    grid:                             every combination of these values, for each row
      partition.alpha: [0.1, 1]
    resources: {cpus: 1, gpus: 0, memory_gb: 0}    of one run; see `Resources`
    protocol: few_shot                whose comparison of the runs is printed at the end [none]
    quick:                            what --quick changes: any of the above; `common` is added to,
      common: [federation.rounds=2]   `rows` may also list the names of the rows to keep

A run is named `<row>-<grid values>-seed<s>-<hash>`. The hash covers its complete config, so runs
with different settings never share a folder, and repeating the command finds the same folders.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fedprompt.config.as_typed import AsTyped
from fedprompt.config.as_typed import plain as without_texts
from fedprompt.config.fields import build, option
from fedprompt.config.schema import Config, to_dict, to_yaml
from fedprompt.config.shipped import load_yaml, refuse_unknown, yaml_file
from fedprompt.errors import UserError
from fedprompt.evaluation.registry import comparable
from fedprompt.experiment.compose import compose
from fedprompt.files import refuse_foreign, write_bytes
from fedprompt.reports.compare.names import PLAN, describe, plain

KEYS = ("name", "experiment", "seeds", "common", "rows", "grid", "resources", "protocol", "quick")
MANY = 500
"""So many runs take seconds to plan, which a command says before it plans them."""
SLUG = 60
"""Maximum length of the readable part of a run's name, in characters."""


@dataclass(frozen=True)
class Resources:
    """What one run needs. It decides how many runs execute together and does not limit any run."""

    cpus: float = option(1.0, "CPU cores; also its threads where simulation.threads is 0", gt=0)
    gpus: float | None = option(
        None, "GPUs, at most 1; null = one if there are any; fractions share one", ge=0, le=1
    )
    memory_gb: float = option(0.0, "memory in GB (10^9 bytes); 0 = not counted", ge=0)


@dataclass(frozen=True)
class SweepFile:
    """The validated content of a sweep file; `rows` and `grid` may be empty.

    The scalars in `grid` are `AsTyped`, since only the type of a key tells what they are.
    """

    name: str
    path: Path
    experiment: str
    seeds: tuple[int, ...]
    common: tuple[str, ...]
    rows: Mapping[str, tuple[str, ...]]
    grid: Mapping[str, tuple[Any, ...]]
    resources: Resources
    protocol: str | None = None


@dataclass(frozen=True)
class PlannedRun:
    """One run: its place in the table, and its complete config including its own folder."""

    name: str
    row: str
    values: Mapping[str, Any]
    seed: int
    config: Config

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(str(self.config.output.dir))

    # Computed once per run: looking for the next of n runs asks for each of them, n times.

    @cached_property
    def parts(self) -> str:
        """A key of the backbone and data that a worker keeps open for the run."""
        return f"{self.config.backbone!r} {self.config.data!r}"

    @cached_property
    def point(self) -> tuple[str, str]:
        """A key of the row and grid values, which runs that differ only in their seed share."""
        return self.row, json.dumps(dict(self.values), sort_keys=True)


def sweep_path(name: str) -> Path:
    """Return the file of a shipped sweep, or `name` itself if it is a YAML file.

    Args:
        name: The name of a shipped sweep, or a path that ends in `.yaml` or `.yml`.

    Returns:
        The path of the sweep file. A YAML file need not exist; `load_sweep` reports that.

    Raises:
        UserError: There is no shipped sweep with this name.
    """
    return yaml_file("sweep", name)


def load_sweep(path: Path, *, quick: bool = False) -> SweepFile:
    """Read and validate a sweep file.

    Args:
        path: The YAML file.
        quick: Whether to apply the changes that the file lists under `quick`.

    Returns:
        The sweep, named by its key `name` or after the file, with `-quick` appended for the small
        variant.

    Raises:
        UserError: The file cannot be read, has unknown keys, or one of its parts is malformed.
    """
    values = load_yaml(path, "sweep")
    refuse_unknown(values, KEYS, f"sweep: {path}")
    if quick:
        values = _quick(values, path)
    experiment = without_texts(values.get("experiment"))
    if not isinstance(experiment, str):
        raise UserError(f"sweep: {path} must name its 'experiment', e.g. experiment: benchmark.")
    # A sweep file and its experiment can be kept in one folder, wherever the command is run.
    beside = path.parent / experiment
    if experiment.endswith((".yaml", ".yml")) and beside.is_file():
        experiment = str(beside)
    name = without_texts(values.get("name", path.stem))
    # It becomes a folder, which must stay within the folder of runs.
    if not isinstance(name, str) or Path(name).name != name or name[:1] in ("", "."):
        raise UserError(f"sweep: {path}: 'name' must be the name of a folder, not {name!r}.")
    return SweepFile(
        name=f"{name}-quick" if quick else name,
        path=path,
        experiment=experiment,
        seeds=check_seeds(without_texts(values.get("seeds", [1])), str(path)),
        common=_texts(values.get("common"), f"{path}: 'common'"),
        rows=_rows(values.get("rows"), path),
        grid=_grid(values.get("grid"), path),
        resources=build(Resources, values.get("resources") or {}, "resources"),
        protocol=_protocol(without_texts(values.get("protocol")), path),
    )


def count_runs(sweep: SweepFile) -> int:
    """How many runs `expand` will return."""
    points = math.prod(len(values) for values in sweep.grid.values())
    return max(1, len(sweep.rows)) * points * len(sweep.seeds)


def expand(sweep: SweepFile, out: Path, overrides: Sequence[str] = ()) -> list[PlannedRun]:
    """Compose the config of every run of a sweep.

    Args:
        sweep: The sweep.
        out: The folder in which every run gets its own folder.
        overrides: Further overrides of all runs, applied last.

    Returns:
        The runs: seeds vary fastest, then grid values, then rows.

    Raises:
        UserError: A config is invalid (the message names the run), or two runs are the same.
    """
    planned: list[PlannedRun] = []
    by_hash: dict[str, PlannedRun] = {}
    rows = sweep.rows or {"": ()}
    for row, changes in rows.items():
        for values in itertools.product(*sweep.grid.values()):
            typed = dict(zip(sweep.grid, values, strict=True))
            cell = [f"{key}={_as_override(value)}" for key, value in typed.items()]
            point = {key: without_texts(value) for key, value in typed.items()}
            label = ", ".join(filter(None, (row, describe(point)))) or sweep.name
            some = [*sweep.common, *changes, *cell, *overrides]
            # Composed once for all seeds, since their configs differ in nothing else.
            shared = _compose(sweep, some, label)
            if sweep.protocol is not None and sweep.protocol not in shared.protocols:
                raise UserError(
                    f"sweep: {label}: 'protocol: {sweep.protocol}' compares what each run measures "
                    "with it, so that it must be among the run's protocols."
                )
            # A key that takes texts keeps the text, e.g. `yes`, so the table shows it too.
            point = {k: str(v) if _takes_text(shared, k) else point[k] for k, v in typed.items()}
            hashes = settings_hashes(shared, sweep.seeds)
            for seed in sweep.seeds:
                config = replace(shared, seed=seed)
                key = hashes[seed]
                if key in by_hash:
                    other = by_hash[key]
                    twin = ", ".join(filter(None, (other.row, describe(other.values))))
                    raise UserError(
                        f"sweep: '{label}' and '{twin}' are the same runs; does an override undo "
                        "what tells them apart?"
                    )
                name = f"{slug(row, point, config)}-seed{seed}-{key}"
                # Absolute, because Ray workers may have another working directory.
                folder = str((out / name).absolute())
                config = replace(config, output=replace(config.output, dir=folder))
                by_hash[key] = PlannedRun(name, row, point, seed, config)
                planned.append(by_hash[key])
    return planned


def settings_hash(config: Config) -> str:
    """Return ten hex digits that identify a config, ignoring the folders of outputs and cache."""
    return settings_hashes(config, [config.seed])[config.seed]


def settings_hashes(config: Config, seeds: Sequence[int]) -> dict[int, str]:
    """Return the `settings_hash` of a config with each of some seeds.

    The config is written as YAML once, which takes longer than everything else in planning a run.

    Args:
        config: A config.
        seeds: The seeds that take the place of its own.
    """
    text = to_yaml(without_places(config))
    # The seed is a line of its own at the top level, where no other line can look like it.
    before, line, after = f"\n{text}".partition(f"\nseed: {config.seed}\n")
    assert line
    texts = {seed: f"{before}\nseed: {seed}\n{after}"[1:] for seed in seeds}
    return {seed: hashlib.sha256(one.encode()).hexdigest()[:10] for seed, one in texts.items()}


def yaml_text(value: Any) -> str:
    """Write a plain value as one line of YAML that reads back as the same value.

    JSON is YAML except for characters beyond U+FFFF, which JSON writes as two escapes and YAML
    then reads as two characters.
    """
    pair = r"\\u(d[89ab]..)\\u(d[c-f]..)"

    def joined(found: re.Match[str]) -> str:
        character = json.loads('"' + found[0] + '"')
        return f"\\U{ord(character):08x}"

    # A pair behind an escaped backslash is text and no character; the first branch skips it.
    return re.sub(rf"\\\\|{pair}", lambda m: joined(m) if m[1] else m[0], json.dumps(value))


def without_places(config: Config) -> Config:
    """Return the config without folder names: equal for runs that must give the same numbers."""
    return replace(config, output=replace(config.output, dir=None, root="runs", cache=None))


def write_plan(
    sweep: SweepFile, planned: Sequence[PlannedRun], out: Path, overrides: Sequence[str]
) -> None:
    """Write `sweep.json`, from which `fedprompt compare` takes the names of rows.

    Args:
        sweep: The sweep.
        planned: Its runs.
        out: The folder of the sweep, which is created if necessary.
        overrides: The overrides given for all runs, recorded so that a report can repeat the
            command.

    Raises:
        UserError: The folder cannot be written, or holds a `sweep.json` of another program.
    """
    refuse_foreign(out / PLAN, b'"sweep": ')
    content = {
        "sweep": sweep.name,
        # Where the command was given: relative paths in it start there.
        "directory": str(Path.cwd()),
        "out": str(out),
        "file": str(sweep.path),
        "overrides": list(overrides),
        "seeds": list(sweep.seeds),
        "keys": list(sweep.grid),
        "rows": list(sweep.rows),
        "runs": [
            {"name": r.name, "row": r.row, "values": dict(r.values), "seed": r.seed}
            for r in planned
        ],
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_bytes(out / PLAN, f"{json.dumps(content, indent=1)}\n".encode())
    except OSError as error:
        raise UserError(
            f"sweep: cannot write {out / PLAN}: {error.strerror}; choose another --out."
        ) from None


def check_seeds(seeds: Any, where: str) -> tuple[int, ...]:
    """Validate a list of seeds.

    Args:
        seeds: The value to check, which may have any type.
        where: The file or option it comes from, for the error message.

    Returns:
        The seeds as a tuple.

    Raises:
        UserError: The value is not a list of different non-negative whole numbers, or is empty.
    """
    # `type(s) is int` because a bool is an int too: YAML's `true` must not pass as seed 1.
    good = isinstance(seeds, (list, tuple)) and all(type(s) is int and s >= 0 for s in seeds)
    if not good or not seeds or len(set(seeds)) < len(seeds):
        raise UserError(
            f"sweep: {where}: 'seeds' is {seeds!r}; give different whole numbers, e.g. [1, 2, 3]."
        )
    return tuple(seeds)


def read_seeds(text: str) -> tuple[int, ...]:
    """Read the value of the option `--seeds`: whole numbers, separated by commas.

    Raises:
        UserError: It is anything else.
    """
    parts = [part.strip() for part in text.split(",")]
    return check_seeds([int(part) if part.isdecimal() else part for part in parts], "--seeds")


def _compose(sweep: SweepFile, overrides: Sequence[str], label: str) -> Config:
    try:
        config = compose(sweep.experiment, overrides)
    except UserError as error:
        raise UserError(f"sweep: {label}: {error}") from None
    # Seeds are replaced after composing, so an override of the seed would be ignored silently.
    if any(text.partition("=")[0].strip() == "seed" for text in overrides):
        raise UserError(f"sweep: {label}: seed is an override; use 'seeds' or --seeds.")
    if config.output.dir is not None:
        raise UserError(
            f"sweep: {label}: output.dir is set, but every run has a folder of its own; use --out."
        )
    return with_threads(config, sweep.resources)


def with_threads(config: Config, resources: Resources) -> Config:
    """Return the config with a fixed number of threads: its own, or one per core of a run.

    Args:
        config: The config of a run that shares the machine with others.
        resources: What one run needs.
    """
    # The number of threads affects the last bits of sums. It is fixed so that results do not
    # depend on how many runs share the machine.
    threads = config.simulation.threads or max(1, int(resources.cpus))
    return replace(config, simulation=replace(config.simulation, threads=threads))


def _as_override(value: Any) -> str:
    """A grid value as the right side of an override, with the text of every scalar kept."""
    if isinstance(value, AsTyped):
        return value.text
    if isinstance(value, list):
        return f"[{', '.join(map(_as_override, value))}]"
    # JSON is valid YAML, in which overrides are parsed.
    return yaml_text(without_texts(value))


def _takes_text(config: Config, key: str) -> bool:
    """Whether the value of a key in a config is a text."""
    value: Any = to_dict(config)
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return isinstance(value, str)


def slug(row: str, point: Mapping[str, Any], config: Config) -> str:
    """Return the readable part of a run's name.

    Args:
        row: The name of the row; if it is empty, the method stands for it.
        point: The grid values.
        config: The config of the run.
    """
    words = [row or str(config.method.name)]
    words += [f"{key.rpartition('.')[2]}{plain(value)}" for key, value in point.items()]
    return file_name(" ".join(words)) or "run"


def file_name(text: str) -> str:
    """A text as part of a file's name: short, in lower case, with hyphens; may be empty."""
    words = re.sub(r"[^\w.]+", "-", text.lower(), flags=re.ASCII)
    return words[:SLUG].strip("-._")


def _quick(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the keys of the file, overridden by those under its `quick` key."""
    changes = values.get("quick")
    if not isinstance(changes, Mapping):
        raise UserError(f"sweep: {path} has no 'quick' variant.")
    changes = {str(k): v for k, v in changes.items()}
    refuse_unknown(changes, KEYS, f"sweep: {path}: quick")
    merged = {**values, **changes}
    # Later overrides win, so the small variant's are appended to those of the file.
    both = (_texts(part.get("common"), f"{path}: 'common'") for part in (values, changes))
    merged["common"] = [text for texts in both for text in texts]
    if isinstance(changes.get("rows"), list):
        rows = _rows(values.get("rows"), path)
        kept = list(map(str, changes["rows"]))
        for name in kept:
            if name not in rows:
                raise UserError(f"sweep: {path}: quick: no row {name!r}.")
        merged["rows"] = {name: list(rows[name]) for name in kept}
    return merged


def _rows(rows: Any, path: Path) -> dict[str, tuple[str, ...]]:
    if rows is None:
        return {}
    if not isinstance(rows, Mapping):
        raise UserError(f"sweep: {path}: 'rows' must hold 'name: [key=value, ...]' lines.")
    return {str(name): _texts(row, f"{path}: row {str(name)!r}") for name, row in rows.items()}


def _grid(grid: Any, path: Path) -> dict[str, tuple[Any, ...]]:
    if grid is None:
        return {}
    if not isinstance(grid, Mapping) or not all(isinstance(v, list) and v for v in grid.values()):
        raise UserError(f"sweep: {path}: 'grid' must hold 'key: [value, ...]' lines.")
    # Both are set by `expand` for every run.
    for key in ("seed", "output.dir"):
        if key in grid:
            raise UserError(f"sweep: {path}: 'grid' cannot hold {key}; use 'seeds' and --out.")
    return {str(key): tuple(values) for key, values in grid.items()}


def _protocol(name: Any, path: Path) -> str | None:
    """The protocol whose comparison a sweep file asks for."""
    if name is not None and name not in (known := comparable()):
        raise UserError(
            f"sweep: {path}: 'protocol' is {name!r}; these compare runs: {', '.join(known)}."
        )
    return None if name is None else str(name)


def _texts(values: Any, where: str) -> tuple[str, ...]:
    values = without_texts(values)
    if values is None:
        return ()
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise UserError(f"sweep: {where} must be a list of overrides, e.g. [method=promptfl].")
    return tuple(values)
