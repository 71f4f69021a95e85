"""What is tuned: rows of a table, the space of each, and the budget that all of them get.

A plan is made from a sweep file, whose rows are tuned one by one, or from an experiment and a list
of methods. It is stored in the folder of the search, and a folder serves one plan only.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedprompt.config.as_typed import plain as plain_values
from fedprompt.config.schema import Config
from fedprompt.config.search import Choices, Space, space_from
from fedprompt.config.shipped import load_yaml
from fedprompt.data.sections import available
from fedprompt.errors import UserError
from fedprompt.experiment.compose import compose
from fedprompt.files import write_bytes
from fedprompt.sweeps.plan import Resources, load_sweep, sweep_path

PLAN = "tune.json"
"""The plan's file in the folder of a search."""
VALIDATION = 0.2
"""Share of validation images if the experiment sets none aside."""
FRACTIONS = ("local_validation_fraction", "server_validation_fraction")
"""The keys of `partition` that set validation images aside."""

Sampler = Literal["tpe", "random", "grid"]
Pruner = Literal["median", "hyperband", "none"]


@dataclass(frozen=True)
class Budget:
    """What every row gets: a number of trials or, if one of them is set, of steps or seconds.

    Attributes:
        trials: number of trials. The first one has the settings of the row itself.
        batch: number of trials that are proposed together, from the results of all earlier
            batches. Proposals depend on it, so it is part of the plan and not chosen by the
            machine: the same plan gives the same trials everywhere.
        sampler: how trials are proposed.
        pruner: which trials end early.
        seed: seed of the proposals.
        objective: the accuracy on validation images that is maximised.
        steps: client steps of all trials of a row together, in place of a number of trials: a row
            gets batches until its trials have taken so many.
        seconds: seconds of the rounds of all trials of a row together, likewise. How many trials
            that is depends on the machine, and on what else it does.
    """

    trials: int = 12
    batch: int = 4
    sampler: Sampler = "tpe"
    pruner: Pruner = "median"
    seed: int = 1
    objective: Literal["personal", "global"] = "personal"
    steps: int | None = None
    seconds: float | None = None

    def __str__(self) -> str:
        """As it is shown under tables."""
        amount = f"{self.trials} trials"
        if self.steps is not None:
            amount = f"{self.steps} client steps"
        elif self.seconds is not None:
            amount = f"{self.seconds:g} seconds"
        return (
            f"{amount} by {self.sampler}, pruned by {self.pruner}, seed {self.seed}, "
            f"best {self.objective} accuracy on validation images"
        )


@dataclass(frozen=True)
class Row:
    """One row of the table: a method with some settings, and where its best ones are looked for.

    Attributes:
        name: name of the row.
        overrides: the row's changes to the experiment, without those of the search.
        space: where to look, by config key; empty for a method without trainable tensors.
    """

    name: str
    overrides: tuple[str, ...]
    space: Mapping[str, Space]


@dataclass(frozen=True)
class TunePlan:
    """A whole search.

    Attributes:
        name: name of the search and of the sweep that it writes.
        experiment: a shipped experiment or a YAML file.
        common: changes for all rows, in the search and afterwards.
        rows: what is tuned.
        budget: what every row gets.
        seed: the experiment's seed in all trials: the images that are trained on, and the tests
            that are withheld, are those of runs with this seed.
        seeds: seeds of the runs after the search.
        resources: what one run needs.
    """

    name: str
    experiment: str
    common: tuple[str, ...]
    rows: tuple[Row, ...]
    budget: Budget
    seed: int
    seeds: tuple[int, ...]
    resources: Resources


def make_plan(
    name: str,
    overrides: Sequence[str],
    budget: Budget,
    *,
    methods: Sequence[str] = (),
    spaces: Path | None = None,
    seeds: Sequence[int] = (),
) -> TunePlan:
    """Plan the search for a sweep's rows, or for methods on an experiment.

    Args:
        name: a shipped sweep or experiment, or a YAML file of either.
        overrides: changes for all runs.
        budget: what every row gets.
        methods: methods to tune on an experiment; empty for the experiment's own, and for sweeps.
        spaces: a YAML file with spaces by config key, which replace those of the methods; a key
            applies to the rows whose method has it.
        seeds: seeds of the runs after the search; empty for those of the sweep, or 1, 2, 3.

    Returns:
        The plan. If the experiment sets no validation images aside, `common` does so.

    Raises:
        UserError: a name is unknown, a setting or a space is impossible, or nothing can be tuned.
    """
    if not _is_sweep(name):
        # Absolute, because the sweep of the winners is written into another folder.
        is_file = name.endswith((".yaml", ".yml"))
        experiment = str(Path(name).expanduser().absolute()) if is_file else name
        common, resources = tuple(overrides), Resources()
        named: dict[str, tuple[str, ...]] = {m: (f"method={m}",) for m in methods} or {"": ()}
        own_seeds: tuple[int, ...] = (1, 2, 3)
        title = Path(name).stem if is_file else name
    else:
        sweep = load_sweep(sweep_path(name))
        if sweep.grid:
            raise UserError(f"tune: {sweep.path} has a 'grid'; tune its rows in one setting.")
        if methods:
            raise UserError(f"tune: --methods is for experiments; {sweep.path} has rows.")
        experiment, resources, own_seeds = sweep.experiment, sweep.resources, sweep.seeds
        common = (*sweep.common, *overrides)
        named, title = dict(sweep.rows) or {"": ()}, sweep.name
    first = compose(experiment, [*common, *next(iter(named.values()))])
    # The seed is that of the trials. The runs after the search have seeds of their own, and a sweep
    # refuses an override of it.
    common = tuple(text for text in common if text.partition("=")[0].strip() != "seed")
    common += validation_overrides(first)
    wanted = _read_spaces(spaces)
    rows = [row_of(experiment, common, row, changes, wanted) for row, changes in named.items()]
    for key in wanted:
        if not any(key in row.space for row in rows):
            raise UserError(f"tune: {spaces}: no row of this search has the key '{key}'.")
    if not any(row.space for row in rows):
        raise UserError("tune: none of the methods has settings to search.")
    seeds = tuple(seeds) or own_seeds
    return TunePlan(title, experiment, common, tuple(rows), budget, first.seed, seeds, resources)


def row_of(
    experiment: str,
    common: Sequence[str],
    name: str,
    overrides: Sequence[str],
    spaces: Mapping[str, Space],
) -> Row:
    """A row with the space of its method.

    Args:
        experiment: a shipped experiment or a YAML file.
        common: changes for all rows.
        name: name of the row; if it is empty, the method stands for it.
        overrides: the row's own changes.
        spaces: spaces that replace those of the method; a key applies if the method has it.

    Raises:
        UserError: the settings, or a value of `spaces`, are impossible.
    """
    config = compose(experiment, [*common, *overrides])
    space = _space_of(config) | {k: v for k, v in spaces.items() if has_key(config, k)}
    for key in spaces.keys() & space.keys():
        _try_values(experiment, [*common, *overrides], key, spaces[key])
    return Row(name or config.method.name, tuple(overrides), space)


def write_plan(plan: TunePlan, folder: Path) -> None:
    """Store the plan in the folder of the search, or check that it is the folder's own.

    Raises:
        UserError: the folder holds another search, is not one, or cannot be written.
    """
    content = json.loads(json.dumps(_plain(plan)))
    path = folder / PLAN
    if path.is_file():
        try:
            stored = json.loads(path.read_bytes())
        except ValueError:
            raise UserError(f"tune: {path} is damaged; choose another --out.") from None
        stored = stored if isinstance(stored, dict) else {}
        differs = [key for key in content if stored.get(key) != content[key]]
        if differs:
            raise UserError(
                f"tune: {folder} holds another search: '{differs[0]}' differs. Choose another "
                "--out, or repeat the command that began it."
            )
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"tune: {folder} is not empty and holds no search; choose another --out.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(path, f"{json.dumps(content, indent=1)}\n".encode())
    except OSError as error:
        raise UserError(f"tune: cannot write {path}: {error.strerror}.") from None


def _is_sweep(name: str) -> bool:
    if name in available("sweep"):
        return True
    if not name.endswith((".yaml", ".yml")):
        return False
    return "rows" in load_yaml(Path(name).expanduser(), "tune")


def validation_overrides(config: Config) -> tuple[str, ...]:
    """Overrides that set validation images aside, if the experiment does not."""
    partition = config.partition
    if partition.file is not None or any(getattr(partition, key) for key in FRACTIONS):
        return ()
    # The data set's own validation images are the server's.
    keys = FRACTIONS[:1] if config.data.official_validation else FRACTIONS
    return tuple(f"partition.{key}={VALIDATION}" for key in keys)


def _space_of(config: Config) -> dict[str, Space]:
    """The declared spaces of a method's options, and that of the learning rate."""
    method = config.method
    spaces: dict[str, Space] = {"training.lr": method.lr_space} if method.lr_space else {}
    return spaces | {f"method.{key}": space for key, space in method.search_spaces.items()}


def _read_spaces(path: Path | None) -> dict[str, Space]:
    if path is None:
        return {}
    values = plain_values(load_yaml(path.expanduser(), "tune"))
    return {str(key): space_from(str(key), value) for key, value in values.items()}


def _try_values(experiment: str, overrides: Sequence[str], key: str, space: Space) -> None:
    """Compose a config with values of a space, so that an impossible one is refused at the start.

    Raises:
        UserError: a value is refused; the message names the key.
    """
    values = space.values if isinstance(space, Choices) else (space.low, space.high)
    for value in values:
        compose(experiment, [*overrides, f"{key}={json.dumps(value)}"])


def setting(config: Config, key: str) -> Any:
    """The value of a config key, such as `training.lr` or `method.options.kg_weight`.

    Raises:
        AttributeError, KeyError: the config has no such key.
    """
    value: Any = config
    for name in key.split("."):
        # The options of a wrapped method are a mapping, with all keys of that method.
        value = value[name] if isinstance(value, Mapping) else getattr(value, name)
    return value


def has_key(config: Config, key: str) -> bool:
    """Whether a config has a dotted key."""
    try:
        setting(config, key)
    except (AttributeError, KeyError):
        return False
    return True


def _plain(plan: TunePlan) -> dict[str, Any]:
    """The plan as JSON; a space is a list of values or the numbers of its range."""

    def plain(space: Space) -> Any:
        return list(space.values) if isinstance(space, Choices) else dataclasses.asdict(space)

    return {
        "experiment": plan.experiment,
        "common": list(plan.common),
        "rows": {row.name: list(row.overrides) for row in plan.rows},
        "space": {row.name: {k: plain(v) for k, v in row.space.items()} for row in plan.rows},
        # Without what is not set, so that a later version can add further kinds of budgets.
        "budget": {k: v for k, v in dataclasses.asdict(plan.budget).items() if v is not None},
        "seed": plan.seed,
        "seeds": list(plan.seeds),
    }
