"""What trackers store in the run folder, so that a resumed run finds its log again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedprompt.errors import UserError
from fedprompt.files import write_bytes

STATE = "loggers.json"


def read_state(folder: Path, logger: str) -> dict[str, Any]:
    """Read what `write_state` has stored for a tracker.

    Args:
        folder: The run folder.
        logger: The name of the tracker.

    Returns:
        The stored value, which is empty at the start of a run.

    Raises:
        UserError: The file is damaged.
    """
    value = _read(folder).get(logger, {})
    if not isinstance(value, dict):
        raise UserError(f"{folder / STATE} is damaged; remove it to begin a new log.")
    return value


def write_state(folder: Path, logger: str, value: dict[str, Any]) -> None:
    """Store a value for a tracker and keep those of the other trackers.

    Args:
        folder: The run folder.
        logger: The name of the tracker.
        value: What `read_state` will return; it must be JSON.

    Raises:
        UserError: The present file is damaged.
    """
    state = _read(folder) | {logger: value}
    write_bytes(folder / STATE, f"{json.dumps(state, indent=2)}\n".encode())


def _read(folder: Path) -> dict[str, Any]:
    path = folder / STATE
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("not an object")
    except ValueError:
        raise UserError(f"{path} is damaged; remove it to begin a new log.") from None
    return value
