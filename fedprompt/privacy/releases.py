"""What a run has released with noise, recorded before it is released.

A crash makes a run repeat the rounds after its checkpoint. If such a round had already been sent
with noise, and the repetition is sent with other noise, then both have been seen, and epsilon must
count both. The server therefore adds a line to `releases.jsonl` in the run folder before anything
leaves, and a resumed run never rewinds this file:

{"by": "clients", "round": 7, "clients": [0, 3]}               clients are asked for noisy updates
{"by": "server", "round": 7, "clients": [0, 3], "tag": "..."}  the strategy adds noise to their sum
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from fedprompt.errors import UserError
from fedprompt.files import write_bytes

FILE = "releases.jsonl"
"""Name of the record in the run folder."""
By = Literal["clients", "server"]
"""Who draws the noise."""


class Releases:
    """The noisy releases of a run, those of processes that have ended before included.

    Until `open` is called, this process alone remembers them.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._forget()

    def open(self, path: Path) -> None:
        """Continue the record of a run, and write every further release to it.

        Args:
            path: the file; it need not exist.

        Raises:
            UserError: the file is damaged, or cannot be read or written.
        """
        try:
            content = path.read_bytes() if path.is_file() else b""
            *complete, torn = content.split(b"\n")
            self._forget()
            for line in complete:
                self._count(_parsed(line))
            # A crash can cut off the last line, and then nothing of its release has left.
            if torn:
                write_bytes(path, content.removesuffix(torn))
        except OSError as error:
            raise UserError(f"cannot use {path}: {error.strerror}.") from None
        except ValueError as error:
            raise UserError(
                f"{path} is damaged ({error}). It says what the run has released with noise, so "
                "epsilon cannot be given without it; restore it, or start a new run."
            ) from None
        self._path = path

    def add(self, by: By, server_round: int, clients: Sequence[int], tag: str = "") -> None:
        """Record a release. Call it before anything of the release leaves the process.

        Args:
            by: who draws the noise.
            server_round: the round.
            clients: ids of the clients whose images the release concerns.
            tag: identifies the bits that are released. The same bits for the second time reveal
                nothing new, so they are recorded once; releases without a tag are all different.

        Raises:
            UserError: the line cannot be written.
        """
        if tag and self.has(by, server_round, tag):
            return
        line: dict[str, Any] = {"by": by, "round": server_round, "clients": list(clients)}
        if tag:
            line["tag"] = tag
        if self._path is not None:
            try:
                with self._path.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(line) + "\n")
                    stream.flush()
                    os.fsync(stream.fileno())
            except OSError as error:
                raise UserError(
                    f"cannot write {self._path}: {error.strerror}; nothing was released. Free "
                    "some space, then resume the run."
                ) from None
        self._count(line)

    def has(self, by: By, server_round: int, tag: str) -> bool:
        """Whether the release with this round and tag has been recorded."""
        return (by, server_round, tag) in self._tags

    def by_client(self, by: By) -> dict[int, int]:
        """The number of releases that concern a client, by client id."""
        return {client: count for (who, client), count in self._clients.items() if who == by}

    def repeated(self, by: By) -> int:
        """The number of releases beyond the first one of every round."""
        return sum(count - 1 for (who, _), count in self._rounds.items() if who == by)

    def _forget(self) -> None:
        self._tags: set[tuple[By, int, str]] = set()
        self._clients: Counter[tuple[By, int]] = Counter()
        self._rounds: Counter[tuple[By, int]] = Counter()

    def _count(self, line: Mapping[str, Any]) -> None:
        by, server_round = line["by"], line["round"]
        self._tags.add((by, server_round, line.get("tag", "")))
        self._clients.update((by, client) for client in line["clients"])
        self._rounds[by, server_round] += 1


def _parsed(line: bytes) -> dict[str, Any]:
    """One line of the file; raises `ValueError` if it is not a release."""
    release = json.loads(line)
    if not isinstance(release, dict) or not {"by", "round", "clients"} <= set(release):
        raise ValueError(f"no release: {line[:60]!r}")
    return release
