"""A run on disk: config, metrics, checkpoint and results. The server writes it.

It is crash-safe: every file is replaced atomically, or appended to line by line.

checksums.txt          SHA-256 of the files below that do not change any more
config.yaml            the complete config, which reproduces the run
versions.json          the versions that the run was started and resumed with
partition.json         images of every client by class and domain
metrics.jsonl          one line per round; the same bytes with and without a resume
timings.jsonl          seconds per round
releases.jsonl         what was released with noise, see fedprompt/privacy/releases.py
checkpoint.safetensors the last saved round: shared tensors and the strategy's state
strategy/              what the strategy knows about single clients, if anything (client_log.py)
tested.jsonl           results of a test of everyone that is going on (logs.py)
private/               in a simulation, the clients' private tensors (private_log.py)
prompts.safetensors    the final shared prompts
summary.json           the results; it exists only if the run is complete
plots/, report.html    the report
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fedprompt.config.schema import Config, to_dict, to_yaml
from fedprompt.errors import DamagedFile, UserError
from fedprompt.experiment.checkpoint import checkpoint_bytes, read_checkpoint, read_header
from fedprompt.experiment.new_folder import (
    LOCK,
    VERSIONS,
    default_path,
    discard,
    holds_run,
    make,
    make_first_free,
    refuse_taken,
)
from fedprompt.experiment.resuming import read_config
from fedprompt.federation.checkpoint import Checkpoint
from fedprompt.files import remove_temporaries, write_bytes
from fedprompt.files.checksums import (
    ADVICE,
    CHECKSUMS,
    digest,
    read_checksums,
    write_checksums,
)
from fedprompt.reports.run_data import (
    CHECKPOINT,
    CONFIG,
    METRICS,
    PARTITION,
    PROMPTS,
    REPORT,
    SUMMARY,
    TIMINGS,
)
from fedprompt.runtime import versions

log = logging.getLogger("fedprompt.run")

WRITTEN = (
    CHECKSUMS, CONFIG, VERSIONS, PARTITION, METRICS, TIMINGS, CHECKPOINT, PROMPTS, SUMMARY, REPORT,
    "loggers.json",
)  # fmt: skip
"""Files that are replaced atomically, so that a killed process may leave a temporary copy."""


VERIFIED = (CONFIG, PARTITION, PROMPTS, SUMMARY)
"""Files with an entry in `checksums.txt`; a complete run has one for metrics and timings too."""


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
        self._checksums: dict[str, str] | None = None
        # The running digest of `metrics.jsonl`, and how many of its bytes it covers.
        self._hash, self._hashed = hashlib.sha256(), 0
        # The digest that the checkpoint has of the metrics lines up to its round.
        self._metrics_then: str | None = None
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
            before = refuse_taken(path)
            made = make(path)
        else:
            path, before, made = make_first_free(default_path(config)), frozenset(), True
        folder = cls(path)
        folder._before, folder._made_folder = before, made
        try:
            # Once more under the lock: two processes may have found the folder empty.
            refuse_taken(path)
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
            UserError: the folder holds no run, its config was edited or is damaged, or another
                process holds the folder.
        """
        if not holds_run(path):
            raise UserError(f"{path} holds no run to resume (no {CONFIG} of a run).")
        config = read_config(path)
        folder = cls(path)
        if not (path / SUMMARY).exists():  # a finished run is not continued
            folder.record_versions()
        return folder, config

    @property
    def resumed(self) -> bool:
        """Whether the run was started before, by another process."""
        return self._before is None

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
        if self._before is not None:
            discard(self.path, self._before, made=self._made_folder)

    def write(self, name: str, content: bytes, *, secret: bool = False) -> None:
        """Replace one file atomically.

        Args:
            name: the file's name in the folder.
            content: its new content.
            secret: whether only the owner may read it.

        Raises:
            UserError: the disk is full, or the file cannot be written.
        """
        try:
            # The checksum first: a crash in between leaves an entry for a file that is not there,
            # or that is written again with the same content.
            if name in VERIFIED:
                self._set_checksums({name: digest(content)})
            write_bytes(self.path / name, content, mode=0o600 if secret else 0o644)
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

    def _set_checksums(self, entries: Mapping[str, str | None]) -> None:
        """Replace or, with None, remove entries of `checksums.txt`."""
        if self._checksums is None:
            self._checksums = read_checksums(self.path) or {}
        merged = {**self._checksums, **entries}
        self._checksums = {name: value for name, value in merged.items() if value is not None}
        write_checksums(self.path, self._checksums)

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
        # Line by line, since the text of all lines takes as much memory as the records.
        with path.open("rb") as stream:
            for line in stream:
                try:
                    records.append(json.loads(line))
                except ValueError:
                    break
                if not line.endswith(b"\n"):
                    records.pop()
        return records

    def complete(self, summary: Mapping[str, Any]) -> None:
        """Write `summary.json`, which marks the run as complete.

        Args:
            summary: plain JSON values.

        Raises:
            UserError: the disk is full, or the file cannot be written.
            ValueError: a number is NaN or infinite.
        """
        # From now on no line is added, so the files of lines have checksums as well.
        lines = [self.path / name for name in (METRICS, TIMINGS) if (self.path / name).is_file()]
        self._set_checksums({path.name: digest(path.read_bytes()) for path in lines})
        self.write_json(SUMMARY, summary)

    def reopen(self, config: Config) -> None:
        """Make a run go on with another config, also one that was complete.

        Args:
            config: the new config, as `resuming.changed` allows it.

        Raises:
            UserError: the disk is full, or a file cannot be written.
        """
        # The summary goes first: without it the run counts as unfinished, whatever comes next.
        for name in (SUMMARY, PROMPTS):
            (self.path / name).unlink(missing_ok=True)
        self.write(CONFIG, to_yaml(config).encode())
        self.record_versions()

    def rewind(self, server_round: int) -> None:
        """Remove all lines that were written after a checkpoint, and temporary files.

        Args:
            server_round: the checkpoint's round; -1 removes all lines.

        Raises:
            DamagedFile: the metrics up to the checkpoint are not those that it was written with.
            UserError: the disk is full, or a file cannot be written.
        """
        entries: dict[str, str | None] = dict.fromkeys((METRICS, TIMINGS, SUMMARY, PROMPTS))
        # A run of an older version has no entry for its config yet, which was read and accepted.
        if (self.path / CONFIG).is_file():
            entries[CONFIG] = digest((self.path / CONFIG).read_bytes())
        for name in (METRICS, TIMINGS):
            if not (self.path / name).is_file():
                continue
            lines = [
                line
                for line in self.lines(name)
                if line.get("kind", "round") == "round" and line["round"] <= server_round
            ]
            content = "".join(json.dumps(line) + "\n" for line in lines).encode()
            if name == METRICS and self._metrics_then not in (None, digest(content)):
                raise DamagedFile(
                    f"{self.path / METRICS} was changed since the checkpoint of round "
                    f"{server_round}; {ADVICE}."
                )
            self.write(name, content)
            if name == METRICS:
                self._hash, self._hashed = hashlib.sha256(), 0
        self._set_checksums(entries)
        for name in WRITTEN:
            with contextlib.suppress(OSError):
                remove_temporaries(self.path / name)

    def save_checkpoint(self, checkpoint: Checkpoint, config: Config | None = None) -> None:
        """Replace the checkpoint atomically.

        Args:
            checkpoint: the round, its shared tensors, the strategy's state and the totals.
            config: the run's config, which the checkpoint holds as well, so that an edited
                `config.yaml` is noticed and its keys can be named.

        Raises:
            UserError: the disk is full, or the file cannot be written.
        """
        header = {"metrics": self._digest_of_metrics()}
        if config is not None:
            header["config"] = json.dumps(to_dict(config))
        self.write(CHECKPOINT, checkpoint_bytes(checkpoint, header), secret=checkpoint.secret)

    def load_checkpoint(self) -> Checkpoint | None:
        """Read the last checkpoint; None if there is none yet.

        Raises:
            UserError: the file is damaged.
        """
        path = self.path / CHECKPOINT
        if not path.is_file():
            return None
        self._metrics_then = read_header(path).get("metrics")
        return read_checkpoint(path)

    def _digest_of_metrics(self) -> str:
        """The digest of `metrics.jsonl`, of which only new bytes are read."""
        new = b""
        with contextlib.suppress(FileNotFoundError), (self.path / METRICS).open("rb") as stream:
            stream.seek(self._hashed)
            new = stream.read()
        self._hash.update(new)
        self._hashed += len(new)
        return self._hash.hexdigest()


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
