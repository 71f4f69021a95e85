"""Where private tensors live: in memory (a baseline that is not resumed), in files on a node.

private_log.py is the store of a simulation that can be resumed. Private tensors are never part of a
message. Flower's `context.state` is not used: it is lost when a SuperNode restarts, and large
states are slow there.
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
    """SHA-256 of names, types, shapes and bytes of some tensors."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        hashed.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return hashed.hexdigest()


class FileStore:
    """One client's private tensors on its own node: a file per round, the last two are kept.

    Files are written atomically with mode 0600 and hold the SHA-256 of their tensors. A round that
    is repeated after a crash finds what the round before it left, so nothing is trained twice.
    """

    KEPT = 2

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def latest(self, before_round: int) -> Tensors | None:
        """Tensors of the last round before `before_round`, or None.

        Raises:
            UserError: the file is damaged.
        """
        rounds = [r for r in self._rounds() if r < before_round]
        if not rounds:
            return None
        path = self._path(max(rounds))
        try:
            with safe_open(path, framework="pt") as reader:
                tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
                stored = (reader.metadata() or {}).get(CHECKSUM)
            if stored != checksum(tensors):
                raise ValueError("its checksum does not match")
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(
                f"private state {path} cannot be read ({' '.join(str(error).split())}); "
                "remove it to go on from the round before."
            ) from None
        return tensors

    def put(self, server_round: int, tensors: Tensors) -> None:
        """Keep the tensors of one round and of the one before it.

        Raises:
            UserError: the state folder cannot be written.
        """
        if not tensors:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            content = save(tensors, metadata={CHECKSUM: checksum(tensors)})
            write_bytes(self._path(server_round), content, mode=0o600)
        except OSError as error:
            raise UserError(
                f"cannot write private state to {self.folder}: {error.strerror}; set the node's "
                "state-dir to a writable folder."
            ) from None
        # Rounds after this one are left over from a server that went back to a checkpoint.
        past = [r for r in self._rounds() if r <= server_round]
        for stale in set(self._rounds()) - set(past[-self.KEPT :]):
            with contextlib.suppress(OSError):
                self._path(stale).unlink()

    def _path(self, server_round: int) -> Path:
        return self.folder / f"round-{server_round:06d}.safetensors"

    def _rounds(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        matches = (re.fullmatch(r"round-(\d+)\.safetensors", p.name) for p in self.folder.iterdir())
        return sorted(int(m.group(1)) for m in matches if m)
