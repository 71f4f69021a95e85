"""The folder of a suite: `suite.json` says whose it is and which rows were asked for.

suite.json
<scenario>/search/<row>/      the search for a row's settings, as `fedprompt tune` leaves it
<scenario>/{tuned,default}/   a sweep over rows and seeds, as `fedprompt sweep` leaves it
results/<row>.json            the result file of a row, see `result_file`
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from fedprompt.errors import UserError
from fedprompt.files import write_bytes
from fedprompt.suites.spec import Suite
from fedprompt.sweeps.plan import file_name

MARKER = "suite.json"
SEARCH = "search"

Rows = Mapping[str, tuple[str, ...]]


def claim(suite: Suite, rows: Rows, folder: Path) -> dict[str, tuple[str, ...]]:
    """Mark the folder as that of the suite and record the rows, or check that it is the suite's.

    Args:
        suite: The suite.
        rows: Overrides by name of the rows that are asked for now.
        folder: The folder, which is created if necessary.

    Returns:
        The rows of this and of all earlier commands.

    Raises:
        UserError: The folder holds another suite, another version of it or another row of the same
            name, is not one, or cannot be written.
    """
    path = folder / MARKER
    earlier: dict[str, tuple[str, ...]] = {}
    if path.is_file():
        earlier = _earlier(suite, path)
    elif folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"suite: {folder} is not empty and holds no suite; choose another --out.")
    for name, overrides in rows.items():
        if earlier.get(name, overrides) != overrides:
            raise UserError(
                f"suite: {folder} holds another row '{name}': {list(earlier[name])}. Rename the "
                "row, or choose another --out."
            )
    merged = earlier | dict(rows)
    content = {
        "suite": suite.name,
        "suite_hash": suite.hash,
        "file": str(suite.path),
        "rows": {name: list(texts) for name, texts in merged.items()},
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(path, f"{json.dumps(content, indent=1)}\n".encode())
    except OSError as error:
        raise UserError(f"suite: cannot write {path}: {error.strerror}.") from None
    return merged


def search_folder(folder: Path, scenario: str, row: str) -> Path:
    """The folder of the search for a row's settings."""
    return folder / scenario / SEARCH / file_name(row)


def _earlier(suite: Suite, path: Path) -> dict[str, tuple[str, ...]]:
    try:
        stored = json.loads(path.read_bytes())
        name, found = stored["suite"], stored["suite_hash"]
        rows = {str(row): tuple(map(str, texts)) for row, texts in stored["rows"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"suite: {path} is damaged; choose another --out.") from None
    if name != suite.name:
        raise UserError(f"suite: {path.parent} holds the suite '{name}'; choose another --out.")
    if found != suite.hash:
        raise UserError(
            f"suite: {path.parent} holds another content of '{name}', whose results cannot be "
            "compared with this one's; choose another --out."
        )
    return rows
