"""Finding and making the folder of a new run, without touching other people's files."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from fedprompt.config.schema import Config
from fedprompt.errors import UserError
from fedprompt.files.checksums import CHECKSUMS, read_checksums
from fedprompt.reports.run_data import CHECKPOINT, CONFIG, ERROR, METRICS

VERSIONS = "versions.json"
"""The versions with which a run was started and those with which it was resumed, in order."""
LOCK = ".lock"
UNSTARTED = (CONFIG, VERSIONS, CHECKSUMS, "loggers.json", "tensorboard", "wandb", LOCK)
"""What a run may have written before its first round: config, versions, logs of trackers, lock."""


def default_path(config: Config) -> Path:
    """The run folder of a config without `output.dir`, before a number is appended."""
    name = f"{config.experiment}-{config.method.name}-seed{config.seed}"
    return Path(config.output.root).expanduser() / name


def holds_run(path: Path) -> bool:
    """Whether a folder holds a run, finished or not.

    A `config.yaml` alone does not make one: it is a usual name, and resuming a folder of somebody
    else would overwrite files there. A run's own is listed in `checksums.txt` before it is written,
    so a run that is killed at any moment can be resumed.

    Raises:
        DamagedFile: `checksums.txt` is no list of checksums.
    """
    if not (path / CONFIG).is_file():
        return False
    if any((path / name).exists() for name in (VERSIONS, CHECKPOINT, METRICS)):
        return True
    return CONFIG in (read_checksums(path) or {})


def refuse_taken(path: Path) -> frozenset[str]:
    """Refuse a folder that holds anything that a new run might overwrite or remove.

    Args:
        path: the folder, which need not exist.

    Returns:
        The names in it: at most those that a failed attempt leaves behind.

    Raises:
        UserError: the folder holds a run or somebody else's files, or cannot be read.
    """
    try:
        names = frozenset(os.listdir(path))
    except FileNotFoundError:
        return frozenset()
    except OSError as error:
        raise _cannotmake(path, error) from None
    if holds_run(path):
        raise UserError(
            f"{path} already holds a run; resume it with 'fedprompt run --resume {path}', or "
            "choose another output.dir."
        )
    if others := sorted(names - {LOCK, ERROR}):
        raise UserError(
            f"{path} is not empty and is no run (it holds {others[0]!r}); choose another "
            "output.dir, because a run overwrites files in its folder."
        )
    return names


def make(path: Path) -> bool:
    """Create a folder and its parents.

    Returns:
        Whether the folder is new; False if it exists.

    Raises:
        UserError: the folder cannot be created.
    """
    try:
        path.mkdir(parents=True)
    except OSError as error:
        if isinstance(error, FileExistsError) and path.is_dir():
            return False
        raise _cannotmake(path, error) from None
    return True


def _cannotmake(path: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot create run folder {path}: {error.strerror}; set output.root or output.dir "
        "to a writable place."
    )


def make_first_free(stem: Path) -> Path:
    """Create the first of `stem`, `stem-2`, ... that does not exist.

    Creating the folder, instead of testing for it, gives runs that start at the same time different
    folders.
    """
    path, number = stem, 2
    # A file or a dangling link takes a name as well.
    while os.path.lexists(path) or not make(path):
        path = stem.with_name(f"{stem.name}-{number}")
        number += 1
    return path


def discard(path: Path, before: frozenset[str], *, made: bool) -> None:
    """Remove what a process has written for a new run that failed before its first round.

    Args:
        path: the run folder. If anything else was put there meanwhile, nothing is removed.
        before: the names that were in it before this process.
        made: whether this process has made the folder, which is then removed as well if it is
            empty.
    """
    if any(entry.name not in UNSTARTED for entry in path.iterdir()):
        return
    for name in UNSTARTED:
        entry = path / name
        if name in before:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                entry.unlink()
    if made:
        # Succeeds only if the folder is empty.
        with contextlib.suppress(OSError):
            path.rmdir()
