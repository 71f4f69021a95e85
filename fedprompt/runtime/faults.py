"""Logs what goes wrong again and again once, and how often it came again when the run ends.

A client whose prompts have diverged fails in every later round for the same reason. A warning in
each of them would hide everything else.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping

LISTED = 8
"""Maximum number of clients that a line names."""
NUMBER = re.compile(r"[-+]?\d[\d.,]*(e[-+]?\d+)?")


class Faults:
    """Faults of one kind since a run began.

    Args:
        log: where they are logged.
        what: what the lines are about, such as `reply dropped`.
    """

    def __init__(self, log: logging.Logger, what: str) -> None:
        self._log, self._what = log, what
        self._clients: Counter[tuple[int, str]] = Counter()
        self._rounds: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, reasons: Mapping[int, str], *, known: bool = False) -> None:
        """Count the faults of some clients, and log those that are new, one line per reason.

        Reasons that differ in their numbers only are the same.

        Args:
            reasons: what is wrong, by client id in ascending order.
            known: whether an earlier process has logged them already, as when a run is resumed.
        """
        new: dict[str, list[int]] = {}
        for client, reason in reasons.items():
            fault = client, kind_of(reason)
            if fault not in self._clients and not known:
                new.setdefault(fault[1], []).append(client)
            self._clients[fault] += 1
        for clients in new.values():
            self._log.warning("%s: %s: %s", named(clients), self._what, reasons[clients[0]])

    def add_round(self, server_round: int, reason: str) -> None:
        """Count a fault of a whole round, and log it if it is new.

        Args:
            server_round: the round.
            reason: what is wrong.
        """
        kind = kind_of(reason)
        if kind not in self._first:
            self._first[kind] = f"round {server_round}: {reason}"
            self._log.warning("%s", self._first[kind])
        self._rounds[kind] += 1

    def close(self) -> None:
        """Log how often faults came again, in one line each for clients and rounds; forget them."""
        again: Counter[int] = Counter()
        for (client, _), times in self._clients.items():
            again[client] += times - 1
        if clients := sorted(client for client, times in again.items() if times):
            more = again.total()
            self._log.warning(
                "%s: %s %d more time%s, for reasons given above",
                named(clients),
                self._what,
                more,
                "s" * (more > 1),
            )
        for kind, times in self._rounds.items():
            if times > 1:
                s = "s" * (times > 2)
                self._log.warning(
                    "%s; likewise in %d more round%s", self._first[kind], times - 1, s
                )
        for counted in (self._clients, self._rounds, self._first):
            counted.clear()


def named(clients: list[int]) -> str:
    """Name clients: `client 6`, or `clients 5, 6`; of many, the first ones and how many more."""
    listed = ", ".join(map(str, clients[:LISTED]))
    more = f" and {len(clients) - LISTED} more" if len(clients) > LISTED else ""
    return f"client{'s' * (len(clients) > 1)} {listed}{more}"


def kind_of(reason: str) -> str:
    """A reason without its numbers, which may differ from round to round."""
    return NUMBER.sub("#", reason)
