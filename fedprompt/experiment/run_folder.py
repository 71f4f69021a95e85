"""A run on disk: config, metrics, checkpoint and results. The server writes it.

It is crash-safe: every file is replaced atomically, or appended to line by line.

config.yaml            the complete config, which reproduces the run
versions.json          the versions that the run was started and resumed with
partition.json         images of every client by class and domain
metrics.jsonl          one line per round; the same bytes with and without a resume
timings.jsonl          seconds per round
releases.jsonl         what was released with noise, see fedprompt/privacy/releases.py
checkpoint.safetensors the last saved round: shared tensors and the strategy's state
private/               in a simulation, the clients' private tensors (private_log.py)
prompts.safetensors    the final shared prompts
summary.json           the results; it exists only if the run is complete
plots/, report.html    the report
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors.torch import save

from fedprompt.config.schema import Config, to_yaml
from fedprompt.errors import UserError
from fedprompt.experiment.checkpoint import read_checkpoint
from fedprompt.experiment.compose import compose
from fedprompt.federation.checkpoint import Checkpoint
from fedprompt.files import remove_temporaries, write_bytes
from fedprompt.reports.run_data import (
    CHECKPOINT,
    CONFIG,
    ERROR,
    METRICS,
    PARTITION,
    PROMPTS,
    REPORT,
    SUMMARY,
    TIMINGS,
)
from fedprompt.runtime import versions

log = logging.getLogger("fedprompt.run")

VERSIONS = "versions.json"
"""The versions with which a run was started and those with which it was resumed, in order."""

LOCK = ".lock"
UNSTARTED = (CONFIG, VERSIONS, "loggers.json", "tensorboard", "wandb", LOCK)
"""What a run may have written before its first round: config, versions, logs of trackers, lock."""


WRITTEN = (
    CONFIG, VERSIONS, PARTITION, METRICS, TIMINGS, CHECKPOINT, PROMPTS, SUMMARY, REPORT,
    "loggers.json",
)  # fmt: skip
"""Files that are replaced atomically, so that a killed process may leave a temporary copy."""


class RunFolder:
    """The folder of one run, which one process at a time can hold.

    Args:
        path: the folder, which must exist.

    Raises:
        UserError: another process holds the folder, or it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # What was there before this process; None unless `create` made this a new run.
        self._before: frozenset[str] | None = None
        self._made_folder = False
        # Two processes that resume the same run would interleave their lines. The operating system
        # releases the lock of a process that dies.
        self._lock = FileLock(path / LOCK)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"{path} is in use by another process.") from None
        except OSError as error:
            raise UserError(f"cannot write to {path}: {error.strerror}.") from None

    @classmethod
    def create(cls, config: Config) -> RunFolder:
        """Create the folder of a new run and write its `config.yaml`.

        Args:
            config: the experiment. The folder is `output.dir` or, if that is not set,
                `<output.root>/<experiment>-<method>-seed<seed>`, with `-2`, `-3`, ... appended
                if the name is taken.

        Returns:
            The locked folder.

        Raises:
            UserError: the folder already holds a run or files of somebody else, or cannot be
                written.
        """
        if config.output.dir:
            path = Path(config.output.dir).expanduser()
            # Refused before the lock, so that not even its file is added to such a folder.
            before = _refuse_taken(path)
            made = _make(path)
        else:
            path, before, made = _make_first_free(default_path(config)), frozenset(), True
        folder = cls(path)
        folder._before, folder._made_folder = before, made
        try:
            # Once more under the lock: two processes may have found the folder empty.
            _refuse_taken(path)
        except UserError:
            folder.close()
            raise
        folder.write(CONFIG, to_yaml(config).encode())
        folder.record_versions()
        return folder

    @classmethod
    def resume(cls, path: Path) -> tuple[RunFolder, Config]:
        """Lock the folder of an existing run.

        Args:
            path: the run folder.

        Returns:
            The locked folder and the run's config.

        Raises:
            UserError: the folder holds no run, its config is damaged, or another process holds
                the folder.
        """
        if not holds_run(path):
            raise UserError(f"{path} holds no run to resume (no {CONFIG} of a run).")
        config = compose(path / CONFIG)
        folder = cls(path)
        if not (path / SUMMARY).exists():  # a finished run is not continued
            folder.record_versions()
        return folder, config

    def record_versions(self) -> None:
        """Append the versions of this process to `versions.json`, if they differ from the last.

        The last bits of a result depend on the versions of the libraries, so a run that is resumed
        with other versions logs a warning.

        Raises:
            UserError: the disk is full, or the file cannot be written.
        """
        here = versions()
        try:
            earlier = json.loads((self.path / VERSIONS).read_text(encoding="utf-8"))
            last = dict(earlier[-1])
        except (OSError, ValueError, TypeError, IndexError):
            earlier, last = [], {}
        if last == here:
            return
        if changed := [f"{n} {last[n]}, now {v}" for n, v in here.items() if last.get(n, v) != v]:
            log.warning(
                "the run began with other versions (%s); the last bits of its results may differ",
                "; ".join(changed),
            )
        self.write(VERSIONS, f"{json.dumps([*earlier, here], indent=2)}\n".encode())

    def close(self) -> None:
        """Release the lock."""
        self._lock.release()

    def discard_unstarted(self) -> None:
        """Remove what this process has written for a new run that failed before its first round.

        The next attempt then gets the same name, without a number. The folder itself is removed if
        this process has made it and nothing else is in it. A resumed run is left alone.
        """
        if self._before is None or any(p.name not in UNSTARTED for p in self.path.iterdir()):
            return
        for name in UNSTARTED:
            path = self.path / name
            if name in self._before:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    path.unlink()
        if self._made_folder:
            # Succeeds only if the folder is empty.
            with contextlib.suppress(OSError):
                self.path.rmdir()

    def write(self, name: str, content: bytes) -> None:
        """Replace one file atomically.

        Args:
            name: the file's name in the folder.
            content: its new content.

        Raises:
            UserError: the disk is full, or the file cannot be written.
        """
        try:
            write_bytes(self.path / name, content)
        except OSError as error:
            raise UserError(
                f"cannot write {self.path / name}: {error.strerror}; resume the run from its "
                f"checkpoint with 'fedprompt run --resume {self.path}'."
            ) from None

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Replace one JSON file atomically, with each list of numbers on one line.

        Args:
            name: the file's name in the folder.
            value: plain JSON values.

        Raises:
            UserError: the disk is full, or the file cannot be written.
            ValueError: a number is NaN or infinite.
        """
        text = json.dumps(value, indent=2, allow_nan=False)
        # Joins the lines of each list of numbers. Lists with a quote are left alone, so no string
        # can be changed.
        text = re.sub(r'\[\n[^\]\["{}]+\]', lambda m: f"[{' '.join(m[0][1:-1].split())}]", text)
        self.write(name, f"{text}\n".encode())

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Append one line to a `.jsonl` file and flush it to disk.

        Args:
            name: the file's name in the folder.
            record: plain JSON values.

        Raises:
            UserError: the disk is full, or the file cannot be written.
            ValueError: a number is NaN or infinite.
        """
        try:
            with (self.path / name).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(record, allow_nan=False) + "\n")
                stream.flush()
                # A checkpoint may be written next, and must not reach the disk before this line.
                os.fsync(stream.fileno())
        except OSError as error:
            raise UserError(
                f"cannot write {self.path / name}: {error.strerror}; free some space, then resume "
                f"with 'fedprompt run --resume {self.path}'."
            ) from None

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Read the complete lines of a `.jsonl` file.

        Args:
            name: the file's name in the folder.

        Returns:
            The records; none if there is no file. Everything from the first damaged line on is
            left out, since a crash can cut off the last line.
        """
        path = self.path / name
        if not path.is_file():
            return []
        records = []
        for line in path.read_bytes().split(b"\n")[:-1]:
            try:
                records.append(json.loads(line))
            except ValueError:
                break
        return records

    def rewind(self, server_round: int) -> None:
        """Remove all lines that were written after a checkpoint, and temporary files.

        Args:
            server_round: the checkpoint's round; -1 removes all lines.

        Raises:
            UserError: the disk is full, or a file cannot be written.
        """
        for name in (METRICS, TIMINGS):
            if not (self.path / name).is_file():
                continue
            lines = [
                line
                for line in self.lines(name)
                if line.get("kind", "round") == "round" and line["round"] <= server_round
            ]
            self.write(name, "".join(json.dumps(line) + "\n" for line in lines).encode())
        for name in WRITTEN:
            with contextlib.suppress(OSError):
                remove_temporaries(self.path / name)

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Replace the checkpoint atomically.

        Args:
            checkpoint: the round, its shared tensors, the strategy's state and the totals.

        Raises:
            UserError: the disk is full, or the file cannot be written.
        """
        groups = {"shared": checkpoint.shared, "strategy": checkpoint.strategy}
        # Cloned, since safetensors refuses tensors that share memory, as a strategy's may.
        tensors = {
            f"{group}/{name}": tensor.detach().contiguous().clone()
            for group, named in groups.items()
            for name, tensor in named.items()
        }
        header = {
            "round": str(checkpoint.server_round),
            "totals": json.dumps(checkpoint.totals),
            "private": checkpoint.private,
        }
        self.write(CHECKPOINT, save(tensors, metadata=header))

    def load_checkpoint(self) -> Checkpoint | None:
        """Read the last checkpoint; None if there is none yet.

        Raises:
            UserError: the file is damaged.
        """
        path = self.path / CHECKPOINT
        return read_checkpoint(path) if path.is_file() else None


def is_held(path: Path) -> bool:
    """Whether a process holds the folder of a run at this moment."""
    lock = FileLock(path / LOCK)
    try:
        if (path / LOCK).exists():
            lock.acquire(timeout=0)
            lock.release()
    except Timeout:
        return True
    except OSError:
        return False  # whoever opens the folder reports the reason
    return False


def default_path(config: Config) -> Path:
    """The run folder of a config without `output.dir`, before a number is appended."""
    name = f"{config.experiment}-{config.method.name}-seed{config.seed}"
    return Path(config.output.root).expanduser() / name


def holds_run(path: Path) -> bool:
    """Whether a folder holds a run, finished or not.

    A `config.yaml` alone does not make one: it is a usual name, and resuming a folder of somebody
    else would overwrite files there.
    """
    others = (VERSIONS, CHECKPOINT, METRICS)
    return (path / CONFIG).is_file() and any((path / name).exists() for name in others)


def _refuse_taken(path: Path) -> frozenset[str]:
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
        raise _cannot_make(path, error) from None
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


def _make(path: Path) -> bool:
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
        raise _cannot_make(path, error) from None
    return True


def _cannot_make(path: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot create run folder {path}: {error.strerror}; set output.root or output.dir "
        "to a writable place."
    )


def _make_first_free(stem: Path) -> Path:
    """Create the first of `stem`, `stem-2`, ... that does not exist.

    Creating the folder, instead of testing for it, gives runs that start at the same time different
    folders.
    """
    path, number = stem, 2
    # A file or a dangling link takes a name as well.
    while os.path.lexists(path) or not _make(path):
        path = stem.with_name(f"{stem.name}-{number}")
        number += 1
    return path
