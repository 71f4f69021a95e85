"""The sections of an experiment on what a simulation assumes about its clients' devices.

`conditions` says who is there, `clock` how long everything takes, and `asynchronous` whether the
server waits for a whole round.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedprompt.config.fields import option
from fedprompt.errors import UserError


@dataclass(frozen=True)
class ConditionsConfig:
    """Simulated presence of the clients: who can be asked, and who drops out."""

    available: float = option(
        1.0, "probability that a client can be asked to train in a round", gt=0, le=1
    )
    dropout: float = option(
        0.0,
        "probability that a client that was sent the prompts neither trains nor replies",
        ge=0,
        lt=1,
    )
    trace: str | None = option(
        None, "CSV or JSON file of rounds x clients in place of both probabilities", path=True
    )
    seed: int | None = option(
        None, "fixes these draws whatever the run's seed; null = the run's seed", ge=0
    )

    def check(self) -> None:
        """Refuse probabilities beside a trace, which would have no effect."""
        if self.trace is not None and (self.available < 1 or self.dropout > 0):
            raise UserError(
                "'trace' takes the place of 'available' and 'dropout'; set the trace, or the "
                "probabilities."
            )


@dataclass(frozen=True)
class ClockConfig:
    """A simulated clock: how long clients take to receive, train and send."""

    enabled: bool = option(False, "whether a simulation counts the seconds of its rounds")
    # With these limits, no product of a time and of all its factors overflows.
    step_s: float = option(0.1, "seconds of a local step on a usual device", ge=0, le=1e6)
    down_mbps: float | None = option(
        50.0, "usual bandwidth to a client, 10^6 bits per second; null = no limit", ge=1e-6
    )
    up_mbps: float | None = option(
        10.0, "usual bandwidth from a client, 10^6 bits per second; null = no limit", ge=1e-6
    )
    latency_s: float = option(0.05, "seconds that a message takes besides its bytes", ge=0, le=1e6)
    speed_spread: float = option(
        0.0, "standard deviation of the logarithm of the devices' speeds; 0 = all alike",
        ge=0, le=10,
    )  # fmt: skip
    bandwidth_spread: float = option(0.0, "likewise of their bandwidths, up and down", ge=0, le=10)
    jitter: float = option(
        0.0, "likewise of the seconds of one client from round to round", ge=0, le=10
    )
    devices: str | None = option(
        None,
        "CSV or JSON file with client, step_s, down_mbps and up_mbps of every client, in place of "
        "these keys and their spreads",
        path=True,
    )
    deadline_s: float | None = option(
        None, "seconds after which the server aggregates without the clients that are late", gt=0
    )
    seed: int | None = option(
        None, "fixes these draws whatever the run's seed; null = the run's seed", ge=0
    )

    def check(self) -> None:
        """Refuse a deadline or devices without a clock, which would have no effect."""
        for key in ("deadline_s", "devices"):
            if getattr(self, key) is not None and not self.enabled:
                raise UserError(f"'{key}' has no effect without a clock; set clock.enabled=true.")


@dataclass(frozen=True)
class AsynchronousConfig:
    """FedBuff: the server aggregates whenever its buffer is full; a round is one such step."""

    # Buffer and exponent are those of FedBuff's paper.
    enabled: bool = option(False, "whether clients train without waiting for each other")
    buffer: int = option(10, "replies that the server aggregates in a step", ge=1)
    concurrency: int | None = option(
        None, "clients that train at a time; null = as many as federation.fraction asks for", ge=1
    )
    staleness_exponent: float = option(
        0.5, "a reply that is t steps old counts (1 + t)^-exponent; 0 = all replies alike", ge=0
    )
