"""A node's private tensors, in files on that node. Runs on a node, in its worker.

Private tensors are never part of a message. Flower's `context.state` is not used for them, because
it is lost when a SuperNode restarts and slow when it is large. A simulation stores the private
tensors of all its clients in `fedprompt.simulation.private_log`.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from fedprompt.errors import DamagedFile, UserError
from fedprompt.files import write_bytes
from fedprompt.files.tensors import read_tensors, to_bytes
from fedprompt.methods.base import Tensors


class FileStore:
    """One client's private tensors, with one file per round and the last two rounds on disk.

    Files have mode 0600, are replaced atomically and contain the SHA-256 of their tensors. If
    the server repeats a round after a crash, the round must start from the tensors of the round
    before it and not from those of its first attempt, so two rounds are needed.

    Args:
        folder: the client's folder, which is created when the first file is written.
    """

    KEPT_ROUNDS = 2

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def latest(self, before_round: int) -> Tensors | None:
        """Load the tensors of the last round before `before_round`.

        Args:
            before_round: the round that is about to start.

        Returns:
            Tensors by name on the CPU, or None if no such round has been stored.

        Raises:
            UserError: the file is damaged.
        """
        rounds = [r for r in self._rounds() if r < before_round]
        if not rounds:
            return None
        path = self._path(max(rounds))
        try:
            return read_tensors(path, required=True)[0]
        except (OSError, ValueError) as error:
            raise DamagedFile(
                f"private state {path} cannot be read ({' '.join(str(error).split())}); "
                "remove it to continue with those of the round before."
            ) from None

    def put(self, server_round: int, tensors: Tensors) -> None:
        """Store the tensors of one round, and remove those of rounds that are no longer needed.

        Args:
            server_round: the round after whose training they are stored.
            tensors: private tensors by name; without any, nothing is written.

        Raises:
            UserError: the folder cannot be written.
        """
        if not tensors:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            # Serialised in memory first, so that `write_bytes` can replace the file atomically.
            write_bytes(self._path(server_round), to_bytes(tensors), mode=0o600)
        except OSError as error:
            raise UserError(
                f"cannot write private state to {self.folder}: {error.strerror}; set the node's "
                "state-dir to a writable folder."
            ) from None
        # Later rounds were written before the server returned to an earlier checkpoint.
        past = [r for r in self._rounds() if r <= server_round]
        for stale in set(self._rounds()) - set(past[-self.KEPT_ROUNDS :]):
            with contextlib.suppress(OSError):
                self._path(stale).unlink()

    def _path(self, server_round: int) -> Path:
        return self.folder / f"round-{server_round:06d}.safetensors"

    def _rounds(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        matches = (re.fullmatch(r"round-(\d+)\.safetensors", p.name) for p in self.folder.iterdir())
        return sorted(int(m.group(1)) for m in matches if m)
