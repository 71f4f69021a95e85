"""The sums of secure aggregation that a node has helped to unmask, in a file on the node.

A simulation keeps no such record: its clients live in the server's process, and its rounds must be
repeatable.
"""

from __future__ import annotations

import json
from pathlib import Path

from fedprompt.errors import UserError
from fedprompt.files import write_bytes

FILE = "sums.json"


class FileSumLog:
    """A `SumLog` of one client and one run, see fedprompt/privacy/secure_aggregation/survivors.py.

    Args:
        folder: the client's folder, which is created when the first sum is remembered.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE

    def get(self, start: str) -> str | None:
        """The survivors of the sum of updates from these tensors, or None if there was none.

        Raises:
            UserError: the file is damaged.
        """
        return self._read().get(start)

    def put(self, start: str, survivors: str) -> None:
        """Remember a sum; it returns only when this is on the disk.

        Raises:
            UserError: the file is damaged, or cannot be written.
        """
        content = json.dumps({**self._read(), start: survivors}, indent=0)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_bytes(self.path, content.encode(), mode=0o600)
        except OSError as error:
            raise UserError(
                f"cannot write {self.path}: {error.strerror}; set the node's state-dir to a "
                "writable folder."
            ) from None

    def _read(self) -> dict[str, str]:
        try:
            content = json.loads(self.path.read_bytes()) if self.path.is_file() else {}
            if not isinstance(content, dict):
                raise ValueError("it holds no object")
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.path} cannot be read ({' '.join(str(error).split())}). It says which sums "
                "this client has helped to unmask; restore it, or take part in a new run."
            ) from None
        return content
