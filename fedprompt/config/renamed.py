"""Config keys that have another name now; the old name is refused, and the message has the new."""

from __future__ import annotations

from fedprompt.errors import UserError

RENAMED = {
    "grid": "simulation",
    "simulation.cohort_size": "simulation.clients_per_block",
    "simulation.cohort_timeout_s": "simulation.block_timeout_s",
}


def refuse_renamed(key: str) -> None:
    """Refuse a key, or a key in a section, that has another name now.

    Raises:
        UserError: it has; the message names the whole new key.
    """
    section, dot, rest = key.partition(".")
    now = f"{RENAMED.get(section, section)}{dot}{rest}"
    now = RENAMED.get(now, now)
    if now != key:
        raise UserError(f"config: '{key}' is now '{now}'.")
