"""The private tensors of a simulation's clients on disk, in the run folder.

There is one file per checkpoint:

private/round-000012.safetensors   clients (R,), sha256 (R, 32), tensor/<name> (R, ...): the states
                                   that were put since the previous checkpoint, and older ones that
                                   were moved

Every row carries the SHA-256 of the client's tensors, which is verified when the row is read, and
the header that of the ids and of those. Files of older versions have none and are not verified.

The grid reads and stores a client's state in every round that the client trains in; the loop over
rounds saves and restores. Time, memory and disk space grow with the clients that take part, not
with all clients. States that are put stay in memory until the next checkpoint writes them.
Afterwards a client's state is its row in the newest file that holds it, and only two integers per
client stay in memory.

A checkpoint of the run takes three steps. `save` writes the new file and returns a digest of all
files in use. The caller writes its own checkpoint with this digest. `remove_stale` removes the
files that the new checkpoint does not need. A crash at any point leaves either the old checkpoint
or the new one, with all of its files.

`save` also compacts. A file in which at least half of the rows are stale (their clients have a
newer state) may have its live rows moved to the new file, but never more rows than were put. Every
moved row frees at least one stale row, so at most twice the rows that training produces are ever
written, and stale rows do not accumulate.

Shape suffixes: K clients of the run, R rows of a file.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fedprompt.errors import DamagedFile, UserError
from fedprompt.files import write_bytes
from fedprompt.files.tensors import CHECKSUM, checksum
from fedprompt.methods.base import Tensors

CLIENTS, SUMS, TENSOR = "clients", "sha256", "tensor/"


class PrivateLog:
    """The private tensors of clients 0 .. K - 1, by client id.

    A new log is empty; `restore` or `read` loads the states of a checkpoint.

    Args:
        folder: the folder of the files, which is created with the first file.
        clients: number of clients K.
    """

    def __init__(self, folder: Path, clients: int) -> None:
        self.folder = folder
        self._forget(clients)

    @property
    def num_clients(self) -> int:
        """Number of clients K; their ids are 0 .. K - 1."""
        return len(self._file_K)

    def _forget(self, clients: int) -> None:
        # Per client, its file (named by its round; -1 for none) and its row there.
        self._file_K = np.full(clients, -1, dtype=np.int64)
        self._row_K = np.zeros(clients, dtype=np.int64)
        # Per file, the number of its rows, and of those that are some client's newest state.
        self._rows: dict[int, int] = {}
        self._live: dict[int, int] = {}
        self._pending: dict[int, Tensors] = {}

    def get(self, client: int) -> Tensors | None:
        """A client's tensors, or None before its first training.

        Raises:
            UserError: the file with its state is missing or damaged.
        """
        if client in self._pending:
            return self._pending[client]
        file, row = int(self._file_K[client]), int(self._row_K[client])
        if file < 0:
            return None
        with self._reading(file) as reader:
            return _row(reader, row)

    def put(self, client: int, tensors: Tensors) -> None:
        """Store a client's tensors, in memory until the next `save`."""
        if tensors:
            self._pending[client] = tensors

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that identify the files in use; `restore` compares them.

        They cover which files there are and how many rows of each are live, not the tensors.
        """
        files = [(f, self._rows[f], live) for f, live in sorted(self._live.items()) if live]
        return hashlib.sha256(repr(files).encode()).hexdigest()[:16]

    def save(self, server_round: int) -> str:
        """Write all states that were put since the last call.

        Args:
            server_round: the checkpoint's round, higher than in any earlier call.

        Returns:
            The digest, which the caller must store in the run's checkpoint.

        Raises:
            UserError: the disk is full, or the folder cannot be written.
        """
        if self._pending:
            states = {**self._moved(), **self._pending}
            # Sorted, so that the file's bytes do not depend on the order of training.
            clients = sorted(states)
            tensors = {CLIENTS: torch.tensor(clients, dtype=torch.int64)}
            for name in states[clients[0]]:
                tensors[f"{TENSOR}{name}"] = torch.stack([states[c][name] for c in clients])
            tensors[SUMS] = torch.stack([_sum(states[c]) for c in clients])
            header = {CHECKSUM: checksum({n: tensors[n] for n in (CLIENTS, SUMS)})}
            self._write(server_round, save(tensors, metadata=header))
            self._point(server_round, np.array(clients))
            self._pending = {}
        return self.digest

    def remove_stale(self) -> None:
        """Remove files without live rows. Call it after the run's checkpoint is on disk."""
        for file in [f for f, live in self._live.items() if not live]:
            # A file that cannot be removed does no harm, since its rows are never read again.
            with contextlib.suppress(OSError):
                self._path(file).unlink()
            del self._live[file], self._rows[file]

    def read(self, server_round: int, digest: str) -> None:
        """Load the states of a checkpoint without changing anything on disk.

        Only the client ids of each file are read now; `get` reads the tensors.

        Args:
            server_round: the checkpoint's round.
            digest: what `save` returned for it.

        Raises:
            UserError: a file is missing or damaged.
        """
        self._forget(self.num_clients)
        # In ascending order, so that newer files take over the clients of older ones. Files of
        # later rounds were written after the checkpoint, by rounds that are now repeated.
        for file in [f for f in self._files() if f <= server_round]:
            self._point(file, self._clients_of(file))
        if self.digest != digest:
            raise UserError(
                f"{self.folder} does not hold the private states of the checkpoint of round "
                f"{server_round}: files are missing or were changed. {self._restart}"
            )

    def restore(self, server_round: int, digest: str) -> None:
        """Return to a checkpoint: `read` it and remove all files that it does not use.

        Args:
            server_round: the checkpoint's round.
            digest: what `save` returned for it.

        Raises:
            UserError: a file is missing or damaged, or cannot be removed.
        """
        self.read(server_round, digest)
        self.remove_stale()
        self._remove([f for f in self._files() if f > server_round])

    def clear(self) -> None:
        """Forget all states, and remove the files of a run that failed before a checkpoint."""
        self._forget(self.num_clients)
        self._remove(self._files())

    # Files

    def _moved(self) -> dict[int, Tensors]:
        """The states in the files that this checkpoint compacts, by client.

        Files with the fewest live rows come first. At most as many states are moved as were put.
        """
        newer = Counter(int(self._file_K[c]) for c in self._pending)
        left = {f: live - newer[f] for f, live in self._live.items()}
        room, moved = len(self._pending), {}
        for file in sorted(left, key=lambda f: (left[f], f)):
            if not 0 < left[file] <= min(room, self._rows[file] - left[file]):
                continue
            room -= left[file]
            with self._reading(file) as reader:
                for row, client in enumerate(reader.get_tensor(CLIENTS).tolist()):
                    if self._file_K[client] == file and client not in self._pending:
                        moved[client] = _row(reader, row)
        return moved

    def _point(self, file: int, clients_R: NDArray[np.int64]) -> None:
        """Record that the newest states of these clients are the rows of `file`."""
        before, counts = np.unique(self._file_K[clients_R], return_counts=True)
        for older, count in zip(before.tolist(), counts.tolist(), strict=True):
            if older >= 0:
                self._live[older] -= count
        self._file_K[clients_R] = file
        self._row_K[clients_R] = np.arange(len(clients_R))
        self._rows[file] = self._live[file] = len(clients_R)

    def _clients_of(self, file: int) -> NDArray[np.int64]:
        """The client ids of a file's rows (R,).

        Raises:
            UserError: the file is missing or damaged, or its rows do not fit its ids.
        """
        with self._reading(file) as reader:
            clients_R: NDArray[np.int64] = reader.get_tensor(CLIENTS).numpy()
            rows = {
                reader.get_slice(n).get_shape()[0]
                for n in reader.keys()  # noqa: SIM118
            }
            stored = (reader.metadata() or {}).get(CHECKSUM)
            if stored is not None:
                ids = {n: reader.get_tensor(n) for n in (CLIENTS, SUMS)}
                if stored != checksum(ids):
                    raise ValueError("its checksum does not match")
            fits = clients_R.dtype == np.int64 and clients_R.ndim == 1
            if not fits or rows != {len(np.unique(clients_R))}:
                raise ValueError("its rows do not fit its clients")
            if len(clients_R) and not 0 <= clients_R.min() <= clients_R.max() < self.num_clients:
                raise ValueError(f"it holds clients beyond the run's {self.num_clients}")
        return clients_R

    @contextlib.contextmanager
    def _reading(self, file: int) -> Iterator[Any]:
        """Open a file for reading; every error inside the block becomes a `UserError`."""
        path = self._path(file)
        try:
            with safe_open(path, framework="pt") as reader:
                yield reader
        except FileNotFoundError:
            raise UserError(f"private states {path} are missing. {self._restart}") from None
        except (SafetensorError, OSError, ValueError, IndexError) as error:
            raise DamagedFile(
                f"private states {path} are damaged ({error}). {self._restart}"
            ) from None

    def _write(self, file: int, content: bytes) -> None:
        try:
            # Readable by the owner alone: these tensors are what a real client never sends.
            self.folder.mkdir(exist_ok=True, mode=0o700)
            write_bytes(self._path(file), content, mode=0o600)
        except OSError as error:
            raise UserError(
                f"cannot write {self._path(file)}: {error.strerror}; resume the run from its "
                f"checkpoint with 'fedprompt run --resume {self.folder.parent}'."
            ) from None

    def _remove(self, files: list[int]) -> None:
        # A crash while a file was being replaced leaves its temporary file behind.
        strays = self.folder.glob(".round-*.tmp")
        try:
            for path in (*(self._path(f) for f in files), *strays):
                path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot remove old files in {self.folder}: {error.strerror}."
            ) from None

    def _files(self) -> list[int]:
        """The rounds of the files in the folder, in ascending order."""
        if not self.folder.is_dir():
            return []
        matches = (re.fullmatch(r"round-(\d+)\.safetensors", p.name) for p in self.folder.iterdir())
        return sorted(int(m.group(1)) for m in matches if m)

    def _path(self, file: int) -> Path:
        return self.folder / f"round-{file:06d}.safetensors"

    @property
    def _restart(self) -> str:
        config = self.folder.parent / "config.yaml"
        return f"Start the run again with 'fedprompt run {config} output.dir=...'."


def _row(reader: Any, row: int) -> Tensors:
    """One client's tensors. A slice reads only this row of the file.

    Raises:
        ValueError: the tensors are not what was written.
    """
    names = list(reader.keys())
    tensors = {
        n.removeprefix(TENSOR): reader.get_slice(n)[row : row + 1][0]
        for n in names
        if n not in (CLIENTS, SUMS)
    }
    if SUMS in names and not torch.equal(reader.get_slice(SUMS)[row : row + 1][0], _sum(tensors)):
        raise ValueError(f"the checksum of its row {row} does not match")
    return tensors


def _sum(tensors: Tensors) -> torch.Tensor:
    """SHA-256 of one client's tensors, (32,) bytes."""
    return torch.tensor(list(bytes.fromhex(checksum(tensors))), dtype=torch.uint8)
