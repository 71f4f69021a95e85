"""Which clients of a simulation can be asked in a round, and which drop out of it.

The server of a simulation asks before it samples (`present`), and again when it has sampled
(`drops_out`). Draws are keyed by client, round and purpose, or stand in a file. A trace therefore
does not depend on the method, on the sample, on the number of workers or on a resume.

A file has a row per round, from round 1, and a column per client: 1 for a client that takes part, 0
for one that cannot be asked, and x for one that drops out after it was sent the prompts. It is CSV
without a heading, or a JSON list of lists. Rounds after the last row begin again with the first.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedprompt.config.conditions import ConditionsConfig
from fedprompt.errors import UserError
from fedprompt.rng import generator

ABSENT, PRESENT, DROPS_OUT = "0", "1", "x"
Rows = tuple[tuple[str, ...], ...]


class Trace:
    """The presence of a simulation's clients.

    Args:
        config: the `conditions` section.
        seed: the run's seed, which `conditions.seed` replaces.
        clients: number of clients K.

    Attributes:
        digest: SHA-256 of the file; empty without one.

    Raises:
        UserError: the file cannot be read, or does not fit the number of clients.
    """

    def __init__(self, config: ConditionsConfig, seed: int, clients: int) -> None:
        self._config = config
        self._seed = seed if config.seed is None else config.seed
        self._rows: Rows = ()
        self.digest = ""
        if config.trace is not None:
            content = read_input(Path(config.trace), "conditions.trace")
            self.digest = hashlib.sha256(content).hexdigest()
            self._rows = parse_trace(content, Path(config.trace), clients)

    @property
    def trivial(self) -> bool:
        """Whether every client is present in every round and none drops out."""
        return not self._rows and self._config.available == 1 and self._config.dropout == 0

    def present(self, server_round: int, clients: Sequence[int]) -> list[int]:
        """Those of some clients that can be asked to train in a round.

        Args:
            server_round: the round, from 1.
            clients: client ids.
        """
        if self._rows:
            row = self._row(server_round)
            return [c for c in clients if row[c] != ABSENT]
        chance = self._config.available
        return [
            c for c in clients if chance == 1 or self._draw("available", server_round, c) < chance
        ]

    def drops_out(self, server_round: int, client: int) -> bool:
        """Whether a client that is asked in a round neither trains nor replies.

        Args:
            server_round: the round, from 1.
            client: client id.
        """
        if self._rows:
            return self._row(server_round)[client] == DROPS_OUT
        chance = self._config.dropout
        return chance > 0 and self._draw("dropout", server_round, client) < chance

    def _row(self, server_round: int) -> tuple[str, ...]:
        return self._rows[(server_round - 1) % len(self._rows)]

    def _draw(self, purpose: str, server_round: int, client: int) -> float:
        return float(generator(self._seed, purpose, server_round, client).random())


def parse_trace(content: bytes, path: Path, clients: int) -> Rows:
    """Read the rows of a trace file.

    Args:
        content: the file's bytes.
        path: its path; the ending `.json` stands for JSON, all others for CSV.
        clients: number of clients K.

    Returns:
        One row per round with one of `ABSENT`, `PRESENT` and `DROPS_OUT` per client.

    Raises:
        UserError: it is no such table; the message names the row.
    """
    try:
        text = content.decode("utf-8-sig")
        is_json = path.suffix.lower() == ".json"
        read: Any = json.loads(text) if is_json else csv.reader(text.splitlines())
        table = [[str(cell).strip() for cell in row] for row in read]
    except (ValueError, TypeError, RecursionError, csv.Error) as error:
        raise UserError(f"conditions.trace: {path} is no table of rounds ({error}).") from None
    rows = [row for row in table if row]
    if not rows:
        raise UserError(f"conditions.trace: {path} has no rows; write one per round.")
    for number, row in enumerate(rows, start=1):
        if len(row) != clients:
            raise UserError(
                f"conditions.trace: row {number} of {path} has {len(row)} columns; it needs one "
                f"for each of the {clients} clients (partition.clients)."
            )
        if wrong := [cell for cell in row if cell not in (ABSENT, PRESENT, DROPS_OUT)]:
            raise UserError(
                f"conditions.trace: row {number} of {path} has {wrong[0][:20]!r}; use 1 (takes "
                "part), 0 (cannot be asked) or x (drops out)."
            )
    if not any(PRESENT in row for row in rows):
        raise UserError(
            f"conditions.trace: nobody takes part in any round of {path}; write 1 for those who do."
        )
    return tuple(map(tuple, rows))


def read_input(path: Path, key: str) -> bytes:
    """The content of a file that the config names.

    Args:
        path: the file.
        key: the config key that names it.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{key}: cannot read {path}: {error.strerror}.") from None
