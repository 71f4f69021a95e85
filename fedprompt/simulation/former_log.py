"""Private tensors in files of earlier versions, which are read and no longer written.

private/round-000012.safetensors  clients (R,), sha256 (R, 32), tensor/<name> (R, ...): a row per
                                  client that trained since the previous checkpoint

Every row carries the SHA-256 of the client's tensors, and the header that of the ids and of those.
Still older files have none and are not verified. Later files take over from earlier ones.

Shape suffixes: K clients of the run, R rows of a file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from fedprompt.files.tensors import CHECKSUM, checksum
from fedprompt.methods.base import Tensors

CLIENTS, SUMS, TENSOR = "clients", "sha256", "tensor/"
NONE = -1


class FormerStates:
    """Which rows of such files are still the newest states of their clients.

    Args:
        clients: number of clients K.
    """

    def __init__(self, clients: int) -> None:
        self._file_K = np.full(clients, NONE, dtype=np.int64)
        self._row_K = np.zeros(clients, dtype=np.int64)
        self._rows: dict[int, int] = {}

    def __bool__(self) -> bool:
        return bool((self._file_K != NONE).any())

    def file_of(self, client: int) -> int | None:
        """The round of the file with a client's state, or None if it has none here."""
        file = int(self._file_K[client])
        return None if file == NONE else file

    def add(self, file: int, path: Path) -> None:
        """Take over the rows of a file.

        Args:
            file: its round.
            path: its path.

        Raises:
            ValueError: it is damaged, or its rows do not fit its ids.
        """
        try:
            with safe_open(path, framework="pt") as reader:
                names = list(reader.keys())
                if CLIENTS not in names:
                    raise ValueError("it has no rows")
                clients_R = reader.get_tensor(CLIENTS).numpy()
                rows = {reader.get_slice(n).get_shape()[0] for n in names}
                stored = (reader.metadata() or {}).get(CHECKSUM)
                ids = {n: reader.get_tensor(n) for n in (CLIENTS, SUMS)} if stored else {}
        except SafetensorError as error:
            raise ValueError(" ".join(str(error).split())) from None
        if stored is not None and stored != checksum(ids):
            raise ValueError("its checksum does not match")
        fits = clients_R.dtype == np.int64 and clients_R.ndim == 1
        if not fits or rows != {len(np.unique(clients_R))}:
            raise ValueError("its rows do not fit its clients")
        if len(clients_R) and not 0 <= clients_R.min() <= clients_R.max() < len(self._file_K):
            raise ValueError(f"it holds clients beyond the run's {len(self._file_K)}")
        self._file_K[clients_R] = file
        self._row_K[clients_R] = np.arange(len(clients_R))
        self._rows[file] = len(clients_R)

    def read(self, client: int, path: Path) -> Tensors:
        """The state of a client that has one here.

        Args:
            client: the client's id.
            path: the path of `file_of(client)`.

        Raises:
            ValueError: the tensors are not what was written.
            OSError: the file is missing or cannot be read.
        """
        row = int(self._row_K[client])
        try:
            with safe_open(path, framework="pt") as reader:
                # A slice reads only this row of the file.
                parts = {n: reader.get_slice(n)[row : row + 1][0] for n in list(reader.keys())}
        except SafetensorError as error:
            raise ValueError(" ".join(str(error).split())) from None
        del parts[CLIENTS]
        sums = parts.pop(SUMS, None)
        tensors = {n.removeprefix(TENSOR): t for n, t in parts.items()}
        if sums is not None and bytes(sums.tolist()) != bytes.fromhex(checksum(tensors)):
            raise ValueError(f"the checksum of its row {row} does not match")
        return tensors

    def drop(self, clients: Iterable[int]) -> None:
        """Forget the states of clients that have a newer one."""
        self._file_K[list(clients)] = NONE

    def drop_stale(self) -> list[int]:
        """Forget the files without a newest state, and return their rounds."""
        stale = sorted(set(self._rows) - set(self._file_K.tolist()))
        for file in stale:
            del self._rows[file]
        return stale

    @property
    def digest(self) -> str:
        """What checkpoints of earlier versions hold: which files there are, and their live rows."""
        live = {f: int((self._file_K == f).sum()) for f in self._rows}
        files = [(f, self._rows[f], live[f]) for f in sorted(live) if live[f]]
        return hashlib.sha256(repr(files).encode()).hexdigest()[:16]
