"""One owner per folder: two commands that run processes in the same folder would harm each other.

The owner holds a lock, which the operating system releases when the owner ends, and names itself in
a file beside it. Runs in `deploy server`, `deploy node` and `deploy local`.
"""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fedprompt.deploy.guard import kill_group
from fedprompt.errors import UserError
from fedprompt.files import write_bytes
from fedprompt.runtime.endings import command_line

LOCK, OWNER = ".lock", "owner.json"
MARK = "FEDPROMPT_GROUP"
"""Environment variable whose value all processes of an owner share."""


class Ownership:
    """This process's ownership of a folder.

    Processes that an earlier owner has left in the folder are killed. There are none, unless that
    owner and its guard were killed at the same time.

    Args:
        folder: the folder, which must exist.

    Raises:
        UserError: the folder has another owner, or it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = FileLock(folder / LOCK)
        mark = uuid.uuid4().hex
        self.setting = f"{MARK}={mark}"
        self.environment = {MARK: mark}
        try:
            self._lock.acquire(timeout=0)
            if earlier := _owner(folder).get("mark"):
                kill_group(f"{MARK}={earlier}")
            owner = {"process": os.getpid(), "command": command_line(), "mark": mark}
            write_bytes(folder / OWNER, json.dumps(owner, indent=2).encode())
        except Timeout:
            raise UserError(f"{in_use(folder)}; wait until it has ended, or end it.") from None
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror}.") from None

    def release(self) -> None:
        """Give the folder up, after all of its processes have ended."""
        self._lock.release()


def in_use(folder: Path) -> str:
    """Who owns a folder, in a few words for an error message; empty if nobody does."""
    lock = FileLock(folder / LOCK)
    try:
        if (folder / LOCK).exists():
            lock.acquire(timeout=0)
            lock.release()
    except Timeout:
        owner = _owner(folder)
        return f"{folder} is in use by process {owner.get('process')} ({owner.get('command')})"
    except OSError:
        pass
    return ""


def _owner(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / OWNER).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
