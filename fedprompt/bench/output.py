"""Output of a benchmark: progress and tables in the terminal, rows in a JSON file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from fedprompt.bench.compare import Row
from fedprompt.bench.machine import describe_machine, machine
from fedprompt.errors import UserError

Column = tuple[str, str, str]
"""Heading of a column, key of its values in a row, and their format."""
TIMES: tuple[Column, ...] = (
    ("case", "case", ""),
    ("ours s", "ours_s", ".4g"),
    ("reference s", "reference_s", ".4g"),
    ("ratio", "ratio", ".1f"),
    ("of medians", "median_ratio", ".1f"),
    ("max rel. diff", "max_rel_diff", ".1e"),
    ("peak MB", "peak_mb", ".0f"),
)
WIDTH = 150
"""Characters per line of tables that are written to a file or pipe."""


class Output:
    """Collects the rows of a benchmark, and prints them with progress and notes.

    Args:
        title: the subcommand, for the header.
        json_file: file that always contains all rows so far.
        device: the device of the benchmark.

    Raises:
        UserError: the folder of `json_file` does not exist.
    """

    def __init__(self, title: str, json_file: Path | None = None, device: str = "cpu") -> None:
        if json_file is not None and not json_file.absolute().parent.is_dir():
            raise UserError(f"--json {json_file}: there is no such folder.")
        self.console = Console()
        if not self.console.is_terminal:
            self.console = Console(width=WIDTH)
        self.json_file = json_file
        self.machine = machine(device)
        self.rows: list[Row] = []
        self._say(f"bench {title}: {describe_machine(self.machine)}")

    def progress(self, text: str) -> None:
        """Print what is being measured now."""
        self._say(f"  {text}")

    def note(self, text: str) -> None:
        """Print a line that belongs to the result."""
        self._say(text)

    def add(self, row: Row) -> None:
        """Add a row, and rewrite the JSON file, so that an interrupted benchmark loses no rows.

        A row that counts its operations also gets `share_of_products`: its speed divided by that
        of large matrix products alone, the most that the device could reach.

        Raises:
            UserError: the file cannot be written.
        """
        gflop, seconds = row.get("ours_gflop"), row.get("ours_s")
        if gflop and seconds:
            share = gflop / seconds / self.machine["products_gflop_per_s"]
            row = {**row, "share_of_products": share}
        self.rows.append({**row, "machine": self.machine})
        if self.json_file is not None:
            # JSON has no NaN, and a benchmark must not report one.
            text = json.dumps(self.rows, indent=2, allow_nan=False) + "\n"
            try:
                self.json_file.write_text(text, encoding="utf-8")
            except OSError as error:
                raise UserError(f"--json {self.json_file}: {error.strerror}.") from None

    def table(self, columns: Sequence[Column] = TIMES) -> None:
        """Print all rows."""
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for heading, _, form in columns:
            table.add_column(heading, justify="right" if form else "left")
        for row in self.rows:
            table.add_row(*(_cell(row.get(key), form) for _, key, form in columns))
        self.console.print(table)

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def _cell(value: Any, form: str) -> str:
    if value is None:
        return "-"
    return format(value, form) if form and not isinstance(value, str) else str(value)
