"""Tensors by client on disk, in an append-only log: what does not change is written once.

There is one file per checkpoint, of the format of `rows.py`:

round-000012.safetensors   rows are tensors, as .npy files: those that were put since the previous
                           checkpoint and differ from what the client had, and older ones that were
                           moved

A simulation keeps the private tensors of its clients in such a log, a strategy what it knows about
each client. The loop over rounds saves and restores. Time and disk space grow with what changes,
not with all clients: a tensor whose bytes are those that the client has already, such as a memory
of images that no optimiser moves, is not written again. A tensor is on disk as soon as it is put,
so that memory holds one client's tensors at a time, and 56 bytes per client and tensor to find
them.

A checkpoint of the run takes three steps. `save` completes the new file and returns a digest of
everything in the log. The caller writes its own checkpoint with this digest. `remove_stale` removes
the files that the new checkpoint does not need. A crash at any point leaves either the old
checkpoint or the new one, with all of its files.

`save` also compacts. A file of which at least half of the bytes are stale (the clients have newer
tensors) may have its live rows moved to the new file, but never more bytes than were put. Every
moved byte frees at least one stale byte, so at most twice the bytes that training produces are ever
written, and stale bytes do not accumulate.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from fedprompt.errors import DamagedFile, UserError
from fedprompt.files.places import PENDING, Place, Places
from fedprompt.files.rows import RowWriter, read_index, read_row
from fedprompt.files.tensors import from_npy, to_npy


class ClientLog:
    """Tensors of clients 0 .. K - 1, by client id.

    A new log is empty; `restore` or `read` loads the tensors of a checkpoint.

    Args:
        folder: the folder of the files, which is created with the first file.
        clients: number of clients K.
    """

    what: ClassVar[str] = "clients' tensors"
    """What the log holds, for messages."""

    def __init__(self, folder: Path, clients: int) -> None:
        self.folder = folder
        self.num_clients = clients
        self._writer: RowWriter | None = None
        self._forget()

    def _forget(self) -> None:
        self.close()
        self._places = Places(self.num_clients)

    def get(self, client: int) -> dict[str, Tensor] | None:
        """A client's tensors, or None if it has none.

        Raises:
            UserError: the file with its tensors is missing or damaged.
        """
        # Sorted, so that the order of names is that of a safetensors file, whatever was put first.
        names = sorted(self._places.names_of(client))
        return {n: self._read(n, client) for n in names} or None

    def put(self, client: int, tensors: Mapping[str, Tensor]) -> None:
        """Store a client's tensors; an empty dict is not stored.

        Args:
            client: the client's id.
            tensors: tensors by name, with all names of earlier calls for the client.

        Raises:
            UserError: the disk is full, or the folder cannot be written.
        """
        held = self._places.names_of(client)
        if tensors and not held <= set(tensors):
            raise ValueError(f"client {client} stored {sorted(held)} and now {sorted(tensors)}")
        for name, tensor in tensors.items():
            row = to_npy(tensor)
            checksum = hashlib.sha256(row).digest()
            if name not in held or self._places.of(name, client).sha256 != checksum:
                self._append(name, client, row, checksum)

    @property
    def empty(self) -> bool:
        """Whether no client has a tensor."""
        return self._places.empty

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that identify the tensors of all clients, bit for bit.

        They do not depend on the files, nor on the order in which tensors were put.
        """
        return self._places.digest

    def save(self, server_round: int) -> str:
        """Complete the file of all tensors that were put since the last call.

        Args:
            server_round: the checkpoint's round, at least that of any earlier call.

        Returns:
            The digest, which the caller must store in the run's checkpoint.

        Raises:
            UserError: the disk is full, or the folder cannot be written.
        """
        if self._writer is not None:
            self._compact()
            # Nothing is put between two calls of one round, whose file would be replaced.
            assert server_round not in self._places.total
            with self._writing():
                self._writer.finish(self._places.index_of(PENDING), self._path(server_round))
            self._writer = None
            self._places.rename(PENDING, server_round)
        return self.digest

    def remove_stale(self) -> None:
        """Remove files without live rows. Call it after the run's checkpoint is on disk."""
        for file in self._places.drop_stale():
            # A file that cannot be removed does no harm, since its rows are never read again.
            with contextlib.suppress(OSError):
                self._path(file).unlink()

    def read(self, server_round: int, digest: str) -> None:
        """Load the tensors of a checkpoint without changing anything on disk.

        Only the index of each file is read now; `get` reads the tensors.

        Args:
            server_round: the checkpoint's round.
            digest: what `save` returned for it.

        Raises:
            UserError: a file is missing or damaged.
        """
        self._forget()
        # In ascending order, so that newer files take over from older ones. Files of later rounds
        # were written after the checkpoint, by rounds that are now repeated.
        for file in [f for f in self._files() if f <= server_round]:
            self._open(file)
        if self.digest != digest:
            raise UserError(
                f"{self.folder} does not hold the {self.what} of the checkpoint of round "
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
        """Forget all tensors, and remove the files of a run that failed before a checkpoint."""
        self._forget()
        self._remove(self._files())

    def close(self) -> None:
        """Remove what was put since the last checkpoint, and is therefore part of none."""
        if self._writer is not None:
            self._writer.discard()
        self._writer = None

    # Rows

    def _read(self, name: str, client: int) -> Tensor:
        """A client's tensor of one name, verified."""
        place = self._places.of(name, client)
        with self._reading(place.file):
            if place.file == PENDING:
                assert self._writer is not None
                row = self._writer.read(place.offset, place.size)
            else:
                row = read_row(self._path(place.file), place.offset, place.size)
            if hashlib.sha256(row).digest() != place.sha256:
                raise ValueError(f"the checksum of '{name}' of client {client} does not match")
            return from_npy(row)

    def _append(self, name: str, client: int, row: bytes, checksum: bytes) -> None:
        """Write a row for the next checkpoint."""
        with self._writing():
            if self._writer is None:
                # Readable by the owner alone: private tensors are what a real client never sends.
                self.folder.mkdir(exist_ok=True, mode=0o700)
                self._writer = RowWriter(self.folder / ".round-new.tmp")
            offset = self._writer.append(row)
        self._places.put(name, client, Place(PENDING, offset, len(row), checksum))

    def _compact(self) -> None:
        """Move the live rows of the files that this checkpoint replaces.

        Files with the fewest live bytes come first. At most as many bytes are moved as were put.
        """
        total, live_of = self._places.total, self._places.live
        room = total[PENDING]
        older = [(live, file) for file, live in live_of.items() if file != PENDING]
        for live, file in sorted(older):
            if not 0 < live <= min(room, total[file] - live):
                continue
            room -= live
            for name, client in self._places.rows_of(file):
                # Read as a tensor, so that damage is noticed and not copied.
                row = to_npy(self._read(name, client))
                self._append(name, client, row, self._places.of(name, client).sha256)

    # Files

    def _open(self, file: int) -> None:
        """Take over the rows of a file.

        Raises:
            UserError: the file is missing or damaged, or holds clients that the run does not have.
        """
        with self._reading(file):
            index = read_index(self._path(file))
            if index is None:
                return self._open_other(file)
            low, high = index.client.min(initial=0), index.client.max(initial=0)
            if not 0 <= low <= high < self.num_clients:
                raise ValueError(f"it holds clients beyond the run's {self.num_clients}")
        self._places.add(file, index)
        return None

    def _open_other(self, file: int) -> None:
        """Take over a safetensors file of another format.

        Raises:
            ValueError: there is no such format.
        """
        raise ValueError("it has no rows")

    @contextlib.contextmanager
    def _reading(self, file: int) -> Iterator[None]:
        """Every error inside the block, which reads a file, becomes a `UserError`."""
        path = self._path(file)
        try:
            yield
        except FileNotFoundError:
            raise UserError(f"{self.what} {path} are missing. {self._restart}") from None
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise DamagedFile(
                f"{self.what} {path} are damaged ({error}). {self._restart}"
            ) from None

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write {self.what} to {self.folder}: {error.strerror}; resume the run from "
                f"its checkpoint with 'fedprompt run --resume {self.folder.parent}'."
            ) from None

    def _remove(self, files: list[int]) -> None:
        # A crash leaves the temporary file of the next checkpoint behind.
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
