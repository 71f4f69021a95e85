"""Renamed config keys: the old name is refused with a message that gives the new one."""

from __future__ import annotations

from fedprompt.errors import UserError

RENAMED = {
    "grid": "simulation",
    "simulation.cohort_size": "simulation.clients_per_block",
    "simulation.cohort_timeout_s": "simulation.block_timeout_s",
}


def refuse_renamed(key: str) -> None:
    """Refuse a section or key that has been renamed.

    Args:
        key: the name as the user wrote it, e.g. `grid` or `grid.cohort_size`.

    Raises:
        UserError: the key has been renamed; the message gives its full new name.
    """
    section, dot, rest = key.partition(".")
    now = f"{RENAMED.get(section, section)}{dot}{rest}"
    # The key is looked up under its section's new name: `grid.cohort_size` changed in both parts.
    now = RENAMED.get(now, now)
    if now != key:
        raise UserError(f"config: '{key}' is now '{now}'.")
