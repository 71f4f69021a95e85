"""A simulated clock: how many seconds a client takes to receive, train and send in a round.

    seconds = (latency + 8 down / B_down + steps * step_s + 8 up / B_up + latency) * jitter

with the bytes of the real messages, the local steps of the real training, and the client's own
bandwidths and speed. Those are given in a file, or log-normal around the keys of `clock`, as
measured bandwidths and speeds of phones roughly are; draws are keyed by client and purpose, and
those of the jitter by the round as well. The server itself takes no time.

The bytes are counted on the records of a message before it is sent, so that it is known who will
miss a deadline; the names of losses beyond the first, and Flower's own metadata, are not in them.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, MetricRecord, RecordDict

from fedprompt.config.conditions import ClockConfig
from fedprompt.errors import UserError
from fedprompt.federation.trace import read_input
from fedprompt.messages import (
    ARRAYS,
    CONFIG,
    EXTRAS,
    METRICS,
    Traffic,
    records_to_wire,
    to_record,
)
from fedprompt.rng import generator

COLUMNS = ("client", "step_s", "down_mbps", "up_mbps")
BITS = 8e-6
"""Millions of bits in a byte."""
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Device:
    """One client's device: seconds per step, and bandwidths in 10^6 bits per second or None."""

    step_s: float
    down_mbps: float | None
    up_mbps: float | None


class Clock:
    """The clock of a simulation.

    Args:
        config: the `clock` section.
        seed: the run's seed, which `clock.seed` replaces.
        clients: number of clients K.
        message: bytes of a training message and of its reply.

    Attributes:
        digest: SHA-256 of the file of devices; empty without one.

    Raises:
        UserError: the file cannot be read, or lacks a client.
    """

    def __init__(self, config: ClockConfig, seed: int, clients: int, message: Traffic) -> None:
        self._config, self._message = config, message
        self._seed = seed if config.seed is None else config.seed
        self.digest = ""
        self._devices: dict[int, Device] = {}
        if config.devices is not None:
            path = Path(config.devices)
            content = read_input(path, "clock.devices")
            self.digest = hashlib.sha256(content).hexdigest()
            self._devices = parse_devices(content, path, clients)

    def device(self, client: int) -> Device:
        """A client's device: that of the file, or one drawn from the seed.

        Args:
            client: client id.
        """
        if self._devices:
            return self._devices[client]
        config = self._config
        wide = config.bandwidth_spread
        return Device(
            config.step_s / self._factor(config.speed_spread, "device speed", client),
            _times(config.down_mbps, self._factor(wide, "downlink", client)),
            _times(config.up_mbps, self._factor(wide, "uplink", client)),
        )

    def seconds(self, server_round: int, client: int, steps: int) -> float:
        """Seconds from sending a client its message until its reply has arrived.

        Args:
            server_round: the round in which the message is sent, from 1.
            client: client id.
            steps: its local steps in this round.
        """
        device = self.device(client)
        plain = (
            2 * self._config.latency_s
            + _transfer(self._message.down, device.down_mbps)
            + steps * device.step_s
            + _transfer(self._message.up, device.up_mbps)
        )
        return plain * self._factor(self._config.jitter, "jitter", server_round, client)

    def is_late(self, seconds: float) -> bool:
        """Whether a reply misses the deadline."""
        deadline = self._config.deadline_s
        return deadline is not None and seconds > deadline

    def check_deadline(self, steps: Mapping[int, int]) -> None:
        """Refuse a deadline that every client misses in every round.

        Args:
            steps: the fewest local steps in a round of every client that trains.

        Raises:
            UserError: it names the time of the fastest client.
        """
        # With jitter, somebody may be in time now and then.
        if self._config.deadline_s is None or self._config.jitter or not steps:
            return
        fastest = min(self.seconds(1, client, count) for client, count in steps.items())
        if self.is_late(fastest):
            raise UserError(
                f"clock.deadline_s={self._config.deadline_s:g}: even the fastest client takes "
                f"{fastest:.4g} s; raise it."
            )

    def round_seconds(self, times: Mapping[int, float], absent: Mapping[int, str]) -> float:
        """How long the server waits in a round.

        Args:
            times: the seconds of every client that was asked.
            absent: those whose reply does not count.

        Returns:
            The time of the slowest reply that counts. If one is missing, the server waits until
            the deadline; without a deadline, it learns at once that a client has dropped out.
        """
        if absent and self._config.deadline_s is not None:
            return self._config.deadline_s
        return max((s for client, s in times.items() if client not in absent), default=0.0)

    def _factor(self, spread: float, *purpose: str | int) -> float:
        if not spread:
            return 1.0
        return math.exp(spread * float(generator(self._seed, *purpose).standard_normal()))


def message_bytes(shared: Shapes, extras: Shapes) -> Traffic:
    """Bytes of the records in a training message and in its reply.

    Args:
        shared: shapes of the shared tensors.
        extras: shapes of what single clients are sent beside them.
    """

    def zeros(shapes: Shapes) -> Any:
        return to_record({n: np.zeros(shape, np.float32) for n, shape in shapes.items()})

    down = RecordDict({ARRAYS: zeros(shared), CONFIG: ConfigRecord({"server-round": 1})})
    if extras:
        down[EXTRAS] = zeros(extras)
    metrics = MetricRecord({"num-examples": 1, "loss": 1.0})
    up = RecordDict({ARRAYS: zeros(shared), METRICS: metrics})
    return Traffic(len(records_to_wire(down)), len(records_to_wire(up)))


def parse_devices(content: bytes, path: Path, clients: int) -> dict[int, Device]:
    """Read a file of devices.

    Args:
        content: the file's bytes.
        path: its path; the ending `.json` stands for a JSON list of objects, all others for CSV
            with a heading.
        clients: number of clients K.

    Returns:
        The device of every client.

    Raises:
        UserError: it is no such table, or a client is missing or named twice.
    """
    where = f"clock.devices: {path}"
    try:
        text = content.decode("utf-8-sig")
        read: Any = (
            json.loads(text)
            if path.suffix.lower() == ".json"
            else csv.DictReader(io.StringIO(text), skipinitialspace=True)
        )
        devices: dict[int, Device] = {}
        for row in read:
            client, *numbers = (_number(row[name]) for name in COLUMNS)
            # The limits of the keys of `clock`.
            if not (0 <= numbers[0] <= 1e6 and all(1e-6 <= n < math.inf for n in numbers[1:])):
                raise ValueError(
                    f"client {client:g}: step_s is from 0 to 10^6, and bandwidths are at least "
                    "10^-6"
                )
            if client in devices or client not in range(clients):
                raise ValueError(f"client {client:g} is unknown or named twice")
            devices[int(client)] = Device(*numbers)
    except KeyError as error:
        raise UserError(f"{where} has no column {error}; it needs {', '.join(COLUMNS)}.") from None
    except (ValueError, TypeError, OverflowError, RecursionError, csv.Error) as error:
        raise UserError(f"{where} is no table of devices ({error}).") from None
    if missing := sorted(set(range(clients)) - set(devices)):
        raise UserError(f"{where} lacks client {missing[0]}; it needs all {clients} clients.")
    return devices


def _number(value: Any) -> float:
    # `float(True)` is 1.
    if isinstance(value, bool):
        raise ValueError(f"{value} is no number")
    return float(value)


def _transfer(size: int, mbps: float | None) -> float:
    return 0.0 if mbps is None else BITS * size / mbps


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
