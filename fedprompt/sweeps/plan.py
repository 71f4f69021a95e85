"""What a sweep file asks for: every run with its complete config and a folder of its own.

    experiment: benchmark             a shipped experiment, or a YAML file (also beside this one)
    seeds: [1, 2, 3]
    common: [federation.rounds=20]    overrides of all runs
    rows:                             named lines of overrides: the rows of a table
      PromptFL: [method=promptfl]
      FedRSCLIP: []
    grid:                             every combination of these values, for each row
      partition.alpha: [0.1, 1]
    resources: {cpus: 1, gpus: 0, memory_gb: 0}    of one run; see `Resources`
    quick:                            what --quick changes: any of the above; `common` is added to,
      common: [federation.rounds=2]   `rows` may also list the names of the rows to keep

A run is called `<row>-<grid values>-seed<s>-<hash>`. The hash is over its complete config, so runs
with different settings never share a folder, and the same run is found again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedprompt.config.fields import build, option
from fedprompt.config.schema import Config, to_yaml
from fedprompt.config.shipped import configs_dir
from fedprompt.data.sections import available
from fedprompt.errors import UserError, did_you_mean
from fedprompt.experiment.compose import compose
from fedprompt.files import write_bytes
from fedprompt.reports.compare.names import PLAN, describe, plain

KEYS = ("experiment", "seeds", "common", "rows", "grid", "resources", "quick")
SLUG = 60
"""Longest readable part of a run's name."""


@dataclass(frozen=True)
class Resources:
    """What one run takes: so many runs go on at once as there is room for; it limits none."""

    cpus: float = option(1.0, "CPU cores; also its threads where simulation.threads is 0", gt=0)
    gpus: float = option(0.0, "GPUs; fractions share one", ge=0)
    memory_gb: float = option(0.0, "memory in GB (10^9 bytes); 0 = not counted", ge=0)


@dataclass(frozen=True)
class SweepFile:
    """A sweep file's content, checked; rows and grid may be empty."""

    name: str
    path: Path
    experiment: str
    seeds: tuple[int, ...]
    common: tuple[str, ...]
    rows: Mapping[str, tuple[str, ...]]
    grid: Mapping[str, tuple[Any, ...]]
    resources: Resources


@dataclass(frozen=True)
class PlannedRun:
    """One run: where it stands in the table, and its complete config with its own folder."""

    name: str
    row: str
    values: Mapping[str, Any]
    seed: int
    config: Config

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return Path(str(self.config.output.dir))


def sweep_path(name: str) -> Path:
    """The file of a shipped sweep, or `name` itself where it is a YAML file.

    Raises:
        UserError: there is neither.
    """
    if name.endswith((".yaml", ".yml")):
        return Path(name).expanduser()
    known = available("sweep")
    if name not in known:
        raise UserError(f"sweep: no sweep {name!r}.{did_you_mean(name, known)}")
    return configs_dir() / "sweep" / f"{name}.yaml"


def load_sweep(path: Path, *, quick: bool = False) -> SweepFile:
    """The sweep that a YAML file describes; with `quick`, its small variant.

    Raises:
        UserError: not readable, unknown keys, or parts of a wrong form.
    """
    try:
        raw = OmegaConf.to_container(OmegaConf.load(path))
    except OSError as error:
        raise UserError(f"sweep: cannot read {path}: {error.strerror}.") from None
    except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise UserError(f"sweep: {path} is not valid YAML: {error}.") from None
    if not isinstance(raw, dict):
        raise UserError(f"sweep: {path} must hold 'key: value' lines.")
    values = _known_keys({str(k): v for k, v in raw.items()}, str(path))
    if quick:
        values = _quick(values, path)
    experiment = values.get("experiment")
    if not isinstance(experiment, str):
        raise UserError(f"sweep: {path} must name its 'experiment', e.g. experiment: benchmark.")
    beside = path.parent / experiment
    if experiment.endswith((".yaml", ".yml")) and beside.is_file():
        experiment = str(beside)
    return SweepFile(
        name=f"{path.stem}-quick" if quick else path.stem,
        path=path,
        experiment=experiment,
        seeds=check_seeds(values.get("seeds", [1]), str(path)),
        common=_texts(values.get("common"), f"{path}: 'common'"),
        rows=_rows(values.get("rows"), path),
        grid=_grid(values.get("grid"), path),
        resources=build(Resources, values.get("resources") or {}, "resources"),
    )


def expand(sweep: SweepFile, out: Path, overrides: Sequence[str] = ()) -> list[PlannedRun]:
    """Every run of a sweep, its folder under `out`; rows, then grid values, then seeds.

    Raises:
        UserError: a config is not right (the message names the run), or two runs are the same.
    """
    planned: list[PlannedRun] = []
    by_hash: dict[str, PlannedRun] = {}
    rows = sweep.rows or {"": ()}
    for row, changes in rows.items():
        for values in itertools.product(*sweep.grid.values()):
            point = dict(zip(sweep.grid, values, strict=True))
            cell = [f"{key}={json.dumps(value)}" for key, value in point.items()]
            label = ", ".join(filter(None, (row, describe(point)))) or sweep.name
            some = [*sweep.common, *changes, *cell, *overrides]
            shared = _compose(sweep, some, label)
            for seed in sweep.seeds:
                config = replace(shared, seed=seed)
                key = settings_hash(config)
                if key in by_hash:
                    other = by_hash[key]
                    twin = ", ".join(filter(None, (other.row, describe(other.values))))
                    raise UserError(
                        f"sweep: '{label}' and '{twin}' are the same runs; does an override undo "
                        "what tells them apart?"
                    )
                name = f"{_slug(row, point, config)}-seed{seed}-{key}"
                folder = str((out / name).absolute())
                config = replace(config, output=replace(config.output, dir=folder))
                by_hash[key] = PlannedRun(name, row, point, seed, config)
                planned.append(by_hash[key])
    return planned


def settings_hash(config: Config) -> str:
    """Ten hex digits of the complete config but for the places of its outputs and of the cache."""
    return hashlib.sha256(to_yaml(without_places(config)).encode()).hexdigest()[:10]


def without_places(config: Config) -> Config:
    """The config without folder names: equal for runs that must give the same numbers."""
    return replace(config, output=replace(config.output, dir=None, root="runs", cache=None))


def write_plan(
    sweep: SweepFile, planned: Sequence[PlannedRun], out: Path, overrides: Sequence[str]
) -> None:
    """Write `sweep.json`, which `fedprompt compare` reads.

    Raises:
        UserError: the folder cannot be written.
    """
    content = {
        "sweep": sweep.name,
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
    """Whole numbers, none twice.

    Raises:
        UserError: anything else.
    """
    good = isinstance(seeds, (list, tuple)) and all(type(s) is int and s >= 0 for s in seeds)
    if not good or not seeds or len(set(seeds)) < len(seeds):
        raise UserError(
            f"sweep: {where}: 'seeds' is {seeds!r}; give different whole numbers, e.g. [1, 2, 3]."
        )
    return tuple(seeds)


def _compose(sweep: SweepFile, overrides: Sequence[str], label: str) -> Config:
    try:
        config = compose(sweep.experiment, overrides)
    except UserError as error:
        raise UserError(f"sweep: {label}: {error}") from None
    if any(text.partition("=")[0].strip() == "seed" for text in overrides):
        raise UserError(f"sweep: {label}: seed is an override; use 'seeds' or --seeds.")
    if config.output.dir is not None:
        raise UserError(
            f"sweep: {label}: output.dir is set, but every run has a folder of its own; use --out."
        )
    if not config.simulation.threads:
        # Fixed, so that the numbers do not depend on how many runs share the machine.
        threads = max(1, int(sweep.resources.cpus))
        config = replace(config, simulation=replace(config.simulation, threads=threads))
    return config


def _slug(row: str, point: Mapping[str, Any], config: Config) -> str:
    words = [row or str(config.method.name)]
    words += [f"{key.rpartition('.')[2]}{plain(value)}" for key, value in point.items()]
    text = re.sub(r"[^\w.]+", "-", " ".join(words).lower(), flags=re.ASCII)
    return text[:SLUG].strip("-._") or "run"


def _known_keys(values: dict[str, Any], where: str) -> dict[str, Any]:
    for key in values:
        if key not in KEYS:
            raise UserError(f"sweep: {where}: unknown key {key!r}.{did_you_mean(key, KEYS)}")
    return values


def _quick(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The file's keys with those of `quick` over them."""
    changes = values.get("quick")
    if not isinstance(changes, Mapping):
        raise UserError(f"sweep: {path} has no 'quick' variant.")
    changes = _known_keys({str(k): v for k, v in changes.items()}, f"{path}: quick")
    merged = {**values, **changes}
    both = (_texts(part.get("common"), f"{path}: 'common'") for part in (values, changes))
    merged["common"] = [text for texts in both for text in texts]
    if isinstance(changes.get("rows"), list):
        rows = _rows(values.get("rows"), path)
        for name in changes["rows"]:
            if name not in rows:
                raise UserError(f"sweep: {path}: quick: no row {name!r}.")
        merged["rows"] = {name: list(rows[name]) for name in changes["rows"]}
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
    for key in ("seed", "output.dir"):
        if key in grid:
            raise UserError(f"sweep: {path}: 'grid' cannot hold {key}; use 'seeds' and --out.")
    return {str(key): tuple(values) for key, values in grid.items()}


def _texts(values: Any, where: str) -> tuple[str, ...]:
    if values is None:
        return ()
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise UserError(f"sweep: {where} must be a list of overrides, e.g. [method=promptfl].")
    return tuple(values)
