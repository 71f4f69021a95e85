"""The private tensors of a simulation's clients on disk, in the run folder.

The grid reads the states of a block of clients before they train and stores them afterwards; the
loop over rounds saves and restores. The files are those of `fedprompt.files.client_log`: a tensor
that training has not changed, such as a memory of images, is written once per client. Files of
earlier versions, in which every state was written whole, are read (`former_log.py`), and replaced
as their clients train.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping

from torch import Tensor

from fedprompt.files.client_log import ClientLog
from fedprompt.methods.base import Tensors
from fedprompt.simulation.former_log import FormerStates


class PrivateLog(ClientLog):
    """The private tensors of clients 0 .. K - 1, by client id.

    A new log is empty; `restore` or `read` loads the states of a checkpoint.

    Args:
        folder: the folder of the files, which is created with the first file.
        clients: number of clients K.
    """

    what = "private states"

    def get(self, client: int) -> Tensors | None:
        """A client's tensors, or None before its first training.

        Raises:
            UserError: the file with its state is missing or damaged.
        """
        file = self._former.file_of(client)
        if file is None:
            return super().get(client)
        with self._reading(file):
            return self._former.read(client, self._path(file))

    def put(self, client: int, tensors: Mapping[str, Tensor]) -> None:
        """Store a client's tensors; see `ClientLog.put`."""
        super().put(client, tensors)
        if tensors:
            self._former.drop([client])

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that identify the states; see `ClientLog.digest`."""
        # Without any state, and with those of earlier versions alone, as those versions have it.
        if self._places.empty:
            return self._former.digest
        own = super().digest
        if not self._former:
            return own
        return hashlib.sha256(f"{own} {self._former.digest}".encode()).hexdigest()[:16]

    def remove_stale(self) -> None:
        """Remove files without live rows. Call it after the run's checkpoint is on disk."""
        super().remove_stale()
        for file in self._former.drop_stale():
            with contextlib.suppress(OSError):
                self._path(file).unlink()

    def _forget(self) -> None:
        super()._forget()
        self._former = FormerStates(self.num_clients)

    def _open(self, file: int) -> None:
        super()._open(file)
        # Nothing for a file of an earlier version, whose rows have no places.
        self._former.drop(client for _, client in self._places.rows_of(file))

    def _open_other(self, file: int) -> None:
        self._former.add(file, self._path(file))
