"""A node's private tensors, in files on that node. Runs on a node, in its worker.

Private tensors are never part of a message. Flower's `context.state` is not used for them, because
it is lost when a SuperNode restarts and slow when it is large. A simulation stores the private
tensors of all its clients in `fedprompt.simulation.private_log`.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fedprompt.errors import UserError
from fedprompt.files import write_bytes
from fedprompt.methods.base import Tensors

CHECKSUM = "sha256"


def checksum(tensors: Tensors) -> str:
    """SHA-256 of the names, types, shapes and bytes of some tensors, as hexadecimal digits."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        # Names, types and shapes are hashed too, because the same bytes may mean other tensors.
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        hashed.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return hashed.hexdigest()


def read_checked(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Read tensors that were stored with their checksum.

    Args:
        path: a safetensors file.

    Returns:
        Tensors by name on the CPU, and the file's metadata.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as reader:
            tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
            metadata = dict(reader.metadata() or {})
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    if metadata.get(CHECKSUM) != checksum(tensors):
        raise ValueError("its checksum does not match")
    return tensors, metadata


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
            return read_checked(path)[0]
        except (OSError, ValueError) as error:
            raise UserError(
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
            content = save(tensors, metadata={CHECKSUM: checksum(tensors)})
            write_bytes(self._path(server_round), content, mode=0o600)
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
