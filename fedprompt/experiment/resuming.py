"""The config of a run that is read again: unchanged, or changed in the few keys that may change.

A resumed run that silently used other settings than it began with would be a mixture of two
experiments. So an edited `config.yaml` is refused, and only keys in `CHANGEABLE` can be given
beside `--resume`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedprompt.config.schema import Config, to_dict
from fedprompt.errors import DamagedFile, UserError
from fedprompt.experiment.checkpoint import read_header
from fedprompt.experiment.compose import compose
from fedprompt.files.checksums import read_verified
from fedprompt.reports.run_data import CHECKPOINT, CONFIG
from fedprompt.training import learning_rate

CHANGEABLE = ("federation.rounds", "output.loggers", "output.report")
"""Keys that may be changed when a run is resumed."""


def read_config(folder: Path) -> Config:
    """Read the config of a run folder and check that it is the one that the run began with.

    Args:
        folder: the run folder.

    Returns:
        The config.

    Raises:
        UserError: there is no config, it is not valid, or it was edited; the message names the
            edited keys.
        DamagedFile: it was changed, and the run has no checkpoint that would tell which keys.
    """
    path = folder / CONFIG
    try:
        read_verified(path)
    except FileNotFoundError:
        raise UserError(f"{folder} holds no run (no {CONFIG}).") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from None
    except DamagedFile:
        return _unedited(folder)
    return compose(path)


def _unedited(folder: Path) -> Config:
    """Accept a config whose text was changed but not its values, and name changed values."""
    path = folder / CONFIG
    try:
        now = compose(path)
    except UserError as error:
        raise UserError(
            f"{path} was changed since the run began, and is no valid config now: {error} Put it "
            "back from a copy."
        ) from None
    header = read_header(folder / CHECKPOINT) if (folder / CHECKPOINT).is_file() else {}
    if "config" not in header:
        read_verified(path)  # raises again
    keys = differences(json.loads(header["config"]), to_dict(now))
    if keys:
        listed = ", ".join(f"{key} was {old} and is {new}" for key, (old, new) in keys.items())
        raise UserError(
            f"{path} was changed since the run began ({listed}); put it back, or start a new run "
            f"with 'fedprompt run {path} output.dir=...'. To train longer, leave the file as it "
            f"is and use 'fedprompt run --resume {folder} federation.rounds=...'."
        )
    return now


def changed(config: Config, overrides: Sequence[str]) -> Config:
    """Apply the overrides given beside `--resume`.

    Args:
        config: the run's config.
        overrides: changes as on the command line.

    Returns:
        The new config; the same if nothing changes.

    Raises:
        UserError: a changed key is not one of `CHANGEABLE`.
    """
    wanted = compose(config, overrides)
    keys = differences(to_dict(config), to_dict(wanted))
    if other := [key for key in keys if key not in CHANGEABLE]:
        old, new = keys[other[0]]
        raise UserError(
            f"{other[0]} cannot be changed from {old} to {new} when a run is resumed, because its "
            f"results would belong to neither; only {', '.join(CHANGEABLE)} can. Start a new run "
            "with another output.dir."
        )
    return wanted


def schedule_note(old: Config, new: Config, done: int) -> str:
    """Say what another number of rounds does to the learning rate.

    Args:
        old: the config until now.
        new: the config from now on.
        done: the last complete round.
    """
    before, after = old.federation.rounds, new.federation.rounds
    text = f"the run now has {after} rounds instead of {before}"
    if done < 1:
        return text
    cycles = new.method.lr_cycles
    rate = learning_rate(old.training, done, before, cycles)
    if new.training.schedule == "constant":
        return f"{text}; the learning rate stays {rate:g}"
    next_rate = learning_rate(new.training, done + 1, after, cycles)
    return (
        f"{text}; the learning rate of round {done + 1} is {next_rate:.3g} after {rate:.3g} in "
        f"round {done}, "
        f"because the {new.training.schedule} schedule of {after} rounds holds from now on and "
        f"rounds 1 to {done} had that of {before}: the result differs from that of a new run of "
        f"{after} rounds"
    )


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = ""
) -> dict[str, tuple[Any, Any]]:
    """Compare two configs.

    Args:
        old: sections and keys.
        new: sections and keys.
        prefix: what every key begins with.

    Returns:
        Old and new value of every key that differs, e.g. `{"training.lr": (0.1, 0.2)}`.
    """
    found: dict[str, tuple[Any, Any]] = {}
    for key in dict.fromkeys([*old, *new]):
        one, other = old.get(key), new.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found |= differences(one, other, f"{prefix}{key}.")
        # Tuples of a config are lists in JSON.
        elif json.dumps(one) != json.dumps(other):
            found[f"{prefix}{key}"] = (one, other)
    return found
