"""Where the newest tensors of each client are in the files of a `client_log.ClientLog`.

Shape suffixes: K clients of the run, R rows of a file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedprompt.files.rows import Index, Integers

NONE, PENDING = -1, -2
"""In place of a file's round: the client has no such tensor; it is not part of a checkpoint yet."""
SUM_BYTES = 32


@dataclass(frozen=True)
class Place:
    """Where one tensor of one client is.

    Attributes:
        file: the round of its file, or `PENDING`.
        offset: its first byte among the rows of the file.
        size: its number of bytes.
        sha256: its checksum, 32 bytes.
    """

    file: int
    offset: int
    size: int
    sha256: bytes


class _Column:
    """The places of the tensors of one name, by client."""

    def __init__(self, clients: int) -> None:
        self.file_K = np.full(clients, NONE, dtype=np.int64)
        self.offset_K = np.zeros(clients, dtype=np.int64)
        self.size_K = np.zeros(clients, dtype=np.int64)
        self.sums_K = np.zeros((clients, SUM_BYTES), dtype=np.uint8)


class Places:
    """The places of all tensors, in 56 bytes per client and name.

    Args:
        clients: number of clients K.

    Attributes:
        total: by file, the bytes of its rows.
        live: by file, the bytes of those rows that are some client's newest tensor.
    """

    def __init__(self, clients: int) -> None:
        self._clients = clients
        self._columns: dict[str, _Column] = {}
        self.total: dict[int, int] = {}
        self.live: dict[int, int] = {}

    @property
    def empty(self) -> bool:
        """Whether no client has a tensor."""
        return not self._columns

    def names_of(self, client: int) -> set[str]:
        """The names of a client's tensors."""
        return {n for n, c in self._columns.items() if c.file_K[client] != NONE}

    def of(self, name: str, client: int) -> Place:
        """The place of a tensor that the client has."""
        column = self._columns[name]
        numbers = (column.file_K, column.offset_K, column.size_K)
        file, offset, size = (int(array[client]) for array in numbers)
        return Place(file, offset, size, column.sums_K[client].tobytes())

    def put(self, name: str, client: int, place: Place) -> None:
        """Record the place of a client's newest tensor."""
        sums = np.frombuffer(place.sha256, dtype=np.uint8)
        client_1, offset_1, size_1 = np.array([[client], [place.offset], [place.size]])
        self._point(name, place.file, client_1, offset_1, size_1, sums[None])

    def add(self, file: int, index: Index) -> None:
        """Record that the newest tensors of an index are in `file`."""
        for place, name in enumerate(index.names):
            rows = index.name == place
            self._point(
                name,
                file,
                index.client[rows],
                index.offset[rows],
                index.size[rows],
                index.sums[rows],
            )

    def _point(
        self,
        name: str,
        file: int,
        clients_R: Integers,
        offset_R: Integers,
        size_R: Integers,
        sums_R: NDArray[np.uint8],
    ) -> None:
        if name not in self._columns:
            self._columns[name] = _Column(self._clients)
        column = self._columns[name]
        before_R, stale_R = column.file_K[clients_R], column.size_K[clients_R]
        for older in np.unique(before_R[before_R != NONE]).tolist():
            self.live[older] -= int(stale_R[before_R == older].sum())
        column.file_K[clients_R] = file
        column.offset_K[clients_R], column.size_K[clients_R] = offset_R, size_R
        column.sums_K[clients_R] = sums_R
        for counts in (self.total, self.live):
            counts[file] = counts.get(file, 0) + int(size_R.sum())

    def rows_of(self, file: int) -> Iterator[tuple[str, int]]:
        """Name and client of the newest tensors in a file."""
        for name, column in self._columns.items():
            for client in np.flatnonzero(column.file_K == file).tolist():
                yield name, client

    def index_of(self, file: int) -> Index:
        """The newest tensors in a file, by name and then by client."""
        held = {n: np.flatnonzero(c.file_K == file) for n, c in self._columns.items()}
        held = {name: clients for name, clients in held.items() if len(clients)}
        each = [(self._columns[name], clients) for name, clients in held.items()]
        return Index(
            list(held),
            np.concatenate(list(held.values())),
            np.repeat(np.arange(len(held)), [len(clients) for clients in held.values()]),
            np.concatenate([c.offset_K[clients] for c, clients in each]),
            np.concatenate([c.size_K[clients] for c, clients in each]),
            np.concatenate([c.sums_K[clients] for c, clients in each]),
        )

    def rename(self, file: int, new: int) -> None:
        """Record that a file has another round."""
        for column in self._columns.values():
            column.file_K[column.file_K == file] = new
        for counts in (self.total, self.live):
            counts[new] = counts.pop(file)

    def drop_stale(self) -> list[int]:
        """Forget the files without a newest tensor, and return their rounds."""
        stale = [f for f, live in self.live.items() if not live and f != PENDING]
        for file in stale:
            del self.live[file], self.total[file]
        return stale

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that identify the tensors of all clients, bit for bit."""
        hashed = hashlib.sha256()
        for name, column in sorted(self._columns.items()):
            clients_R = np.flatnonzero(column.file_K != NONE)
            hashed.update(f"{name} {len(clients_R)}\n".encode())
            hashed.update(clients_R.tobytes())
            hashed.update(column.sums_K[clients_R].tobytes())
        return hashed.hexdigest()[:16]
