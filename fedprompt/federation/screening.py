"""Decides which replies count, on the server, after every exchange of messages.

Every byte of a reply comes from a client, so nothing in it is trusted.

A reply is data and never code: arrays are read without pickle, their labels are compared with their
bytes, and sizes are bounded before anything is read. Flower's own strategies check nothing: one NaN
spreads to all clients, and one wrong shape ends the run.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict

from fedprompt.messages import (
    ARRAYS,
    MAX_EXAMPLES,
    METRICS,
    Arrays,
    Exchanged,
    Ranges,
    Refused,
    Update,
    read_answers,
    values_of,
)
from fedprompt.runtime.faults import Faults

__all__ = ["Limits", "Row", "Update", "read_training", "screen_evaluations", "screen_replies"]

MAX_METRICS = 100
"""Largest number of metrics that are read from a reply."""
MAX_LOSS = 1e30
"""Larger losses and statistics are left out: their weighted sum over clients could overflow."""
LOSS = re.compile(r"loss(-[A-Za-z0-9_.-]{1,40})?")
"""Names of the metrics that are read as losses; they become keys of files and of trackers."""
STATISTIC = re.compile(r"statistic-[A-Za-z0-9_.-]{1,40}")
"""Names of the metrics that are read as the method's own statistics."""
HEADER_BYTES = 4096
"""An upper bound of the header that NumPy writes before an array."""
# `num-examples` is the name that Flower's own strategies use.
TEST_COUNTS = ("num-examples", "correct")
"""Evaluation metrics of a client's test images: how many there are, and how many were right."""
VALIDATION_COUNTS = ("validation-tested", "validation-correct")
"""Likewise for its validation images."""
COMMON_COUNTS = ("common-tested", "common-correct")
"""Likewise for the server's test images."""
NOT_FINITE = "not-finite"
"""Evaluation metric of a client whose personal model has diverged, and of no other: the number of
images for which it has no finite answer."""

Row = dict[str, int | float]
"""One client's evaluation metrics, by name."""


class Diverged(Refused):
    """A reply that must not count because its tensors are not finite."""


@dataclass(frozen=True)
class Limits:
    """What a training reply must respect.

    Attributes:
        shapes: name and shape of every shared tensor; all are float32.
        max_norm: largest L2 norm of a tensor.
        max_examples_ratio: largest number of images, in multiples of the median over clients;
            infinite where clients are not weighed by them.
        min_replies: smallest number of valid replies for a round to count.
    """

    shapes: Mapping[str, tuple[int, ...]]
    max_norm: float
    max_examples_ratio: float
    min_replies: int


@dataclass(frozen=True)
class Training:
    """What a training reply holds.

    Attributes:
        arrays: trained shared tensors by name.
        num_examples: number of images they were trained on, at least 1.
        losses: finite losses by name.
        statistics: finite statistics by name.
        diverged: which loss is not finite; empty if all are.
    """

    arrays: Arrays
    num_examples: int
    losses: dict[str, float]
    statistics: dict[str, float]
    diverged: str = ""


def screen_replies(
    asked: Sequence[Message],
    replies: Iterable[Message],
    client_of_node: Mapping[int, int],
    limits: Limits,
) -> Exchanged:
    """Check the training replies of a round; each bad one is dropped, counted and named.

    Args:
        asked: the training messages that were sent, one per client.
        replies: what came in time, in any order.
        client_of_node: client of every node that was asked.
        limits: what a reply must respect.

    Returns:
        The valid updates sorted by client id. There are none if fewer than `limits.min_replies` are
        valid.
    """
    diverged: dict[int, str] = {}

    def noting_divergence(node: int, content: RecordDict) -> Training:
        try:
            training = read_training(content, limits)
        except Diverged as error:
            diverged[client_of_node[node]] = str(error)
            raise
        if training.diverged:
            diverged[client_of_node[node]] = training.diverged
        return training

    answers = read_answers(asked, replies, noting_divergence)
    read = {client_of_node[node]: training for node, training in answers.usable.items()}
    dropped = {client_of_node[node]: fault for node, fault in answers.faults.items()}
    dropped |= _inflated_counts(read, limits.max_examples_ratio)
    dropped, diverged = dict(sorted(dropped.items())), dict(sorted(diverged.items()))
    accepted = {client: t for client, t in sorted(read.items()) if client not in dropped}
    losses = {n: v["mean"] for n, v in _spread(accepted.values(), "losses").items()}
    statistics = _spread(accepted.values(), "statistics")
    trained = sorted(
        {client_of_node[m.metadata.dst_node_id] for m in asked}
        - {client_of_node[n] for n in answers.absent}
    )
    if len(accepted) < limits.min_replies:
        void = (
            f"{len(accepted)} valid replies of {len(asked)}, fewer than "
            f"min_replies={limits.min_replies}: nothing aggregated"
        )
        return Exchanged([], len(accepted), dropped, losses, trained, diverged=diverged, void=void)
    updates = [Update(client, t.arrays, t.num_examples) for client, t in accepted.items()]
    return Exchanged(
        updates, len(updates), dropped, losses, trained, diverged=diverged, statistics=statistics
    )


def _inflated_counts(read: Mapping[int, Training], max_ratio: float) -> dict[int, str]:
    """Why updates that claim far more images than the others must not count, by client."""
    images = sorted(t.num_examples for t in read.values())
    # The lower median: of two clients, one cannot raise it.
    limit = max_ratio * images[(len(images) - 1) // 2] if images else 0.0
    return {
        client: f"num-examples is {t.num_examples}, above max_examples_ratio={max_ratio:g} times "
        "the median"
        for client, t in read.items()
        if t.num_examples > limit
    }


def _spread(
    accepted: Collection[Training], kind: Literal["losses", "statistics"]
) -> dict[str, dict[str, float]]:
    """The losses or statistics that most clients report: `mean`, weighted by images, `std`, `max`.

    Most and not all, so that a single client can neither remove a name nor add one.
    """
    counts = Counter(name for t in accepted for name in getattr(t, kind))
    spread = {}
    for name in sorted(n for n, count in counts.items() if 2 * count > len(accepted)):
        reporting = [t for t in accepted if name in getattr(t, kind)]
        weights = np.array([t.num_examples for t in reporting], dtype=np.float64)
        values = np.array([getattr(t, kind)[name] for t in reporting], dtype=np.float64)
        mean = float((values * weights).sum() / weights.sum())
        spread[name] = {"mean": mean, "std": float(values.std()), "max": float(values.max())}
    return spread


def read_training(content: RecordDict, limits: Limits) -> Training:
    """Read the content of one training reply.

    Args:
        content: one client's records.
        limits: what they must respect.

    Returns:
        What the reply holds.

    Raises:
        Refused: the reply must not count.
    """
    if set(content) != {ARRAYS, METRICS}:
        raise Refused(f"records {sorted(content)} instead of ['{ARRAYS}', '{METRICS}']")
    record, metrics = content[ARRAYS], content[METRICS]
    if not isinstance(record, ArrayRecord) or not isinstance(metrics, MetricRecord):
        raise Refused("records of the wrong kind")
    if set(record) != set(limits.shapes):
        raise Refused(f"tensors {sorted(record)} instead of {sorted(limits.shapes)}")
    arrays = {
        name: _read_array(name, record[name], tuple(shape), limits.max_norm)
        for name, shape in limits.shapes.items()
    }
    if len(metrics) > MAX_METRICS or any(isinstance(v, list) for v in metrics.values()):
        raise Refused(f"{len(metrics)} metrics; at most {MAX_METRICS} numbers are read")
    examples = metrics.get("num-examples")
    # `True` is an `int` in Python.
    if isinstance(examples, bool) or not isinstance(examples, int):
        raise Refused(f"num-examples is {examples!r}, not a whole number")
    if not 0 < examples <= MAX_EXAMPLES:
        raise Refused(f"num-examples is {examples}, outside 1..{MAX_EXAMPLES}")

    def named(pattern: re.Pattern[str]) -> dict[str, float]:
        numbers = {n: v for n, v in metrics.items() if isinstance(v, (int, float))}
        return {n: float(v) for n, v in numbers.items() if pattern.fullmatch(n)}

    # A comparison with NaN is false.
    losses = {name: value for name, value in named(LOSS).items() if abs(value) <= MAX_LOSS}
    diverged = [f"'{n}' is {value:g}" for n, value in named(LOSS).items() if n not in losses]
    statistics = {
        name.removeprefix("statistic-"): value
        for name, value in named(STATISTIC).items()
        if abs(value) <= MAX_LOSS
    }
    return Training(arrays, examples, losses, statistics, ", ".join(diverged[:1]))


def _read_array(name: str, array: Array, shape: tuple[int, ...], max_norm: float) -> Any:
    """A tensor of a reply; neither its label nor its bytes are trusted. Raises `Refused`."""
    if array.dtype != "float32" or tuple(array.shape) != shape:
        raise Refused(f"'{name}' is {array.dtype} {tuple(array.shape)}, not float32 {shape}")
    # Checked before anything is parsed, so that a reply cannot exhaust the memory.
    if len(array.data) > 4 * math.prod(shape) + HEADER_BYTES:
        raise Refused(f"'{name}' holds {len(array.data)} bytes, too many for float32 {shape}")
    try:
        values: Any = values_of(array)
    except Exception as error:  # malformed bytes make NumPy raise errors of many types
        raise Refused(f"'{name}' cannot be read: {type(error).__name__}: {error}") from None
    if not isinstance(values, np.ndarray):
        raise Refused(f"'{name}' holds a {type(values).__name__} behind its label")
    if values.dtype != np.float32 or values.shape != shape:
        raise Refused(f"'{name}' holds {values.dtype} {values.shape} behind its label")
    # Squares of float32 numbers cannot overflow in float64, so the norm is finite exactly if all
    # numbers are.
    norm = float(np.linalg.norm(values.astype(np.float64)))
    if not math.isfinite(norm):
        raise Diverged(f"'{name}' holds values that are not finite")
    if norm > max_norm:
        raise Refused(f"'{name}' has norm {norm:.3g}, above max_norm={max_norm:g}")
    return values


def count_ranges(*counts: tuple[str, str]) -> Ranges:
    """The limits of pairs of metrics such as `TEST_COUNTS`: no more are right than were tested."""
    ranges: dict[str, tuple[float, float | str]] = {}
    for tested, correct in counts:
        ranges |= {tested: (0, MAX_EXAMPLES), correct: (0, tested)}
    return ranges


def screen_evaluations(
    asked: Sequence[Message],
    replies: Iterable[Message],
    client_of_node: Mapping[int, int],
    ranges: Ranges,
    faults: Faults,
) -> dict[int, Row]:
    """Check the evaluation replies of a round; bad ones are dropped and logged.

    Args:
        asked: the messages that were sent, one per client.
        replies: what came in time, in any order.
        client_of_node: client of every node that was asked.
        ranges: the metrics that are read, and within which limits; a reply that lacks one of them
            does not count, and all others in a reply, except `NOT_FINITE`, are ignored.
        faults: logs why replies were dropped.

    Returns:
        Metrics by client id, ascending. All rows have the names of `ranges`, and a metric is either
        an integer in all rows or a float in all rows. Those of clients whose model has diverged
        also have `NOT_FINITE`.
    """
    answers = read_answers(asked, replies, lambda node, content: evaluation_row(content, ranges))
    faults.add(dict(sorted((client_of_node[n], fault) for n, fault in answers.faults.items())))
    rows = dict(sorted((client_of_node[node], row) for node, row in answers.usable.items()))
    for name in ranges:
        # A client may send either kind of number, and Flower's records take no list of both.
        if not all(isinstance(row[name], int) for row in rows.values()):
            for row in rows.values():
                row[name] = float(row[name])
    return rows


def evaluation_row(content: RecordDict, ranges: Ranges) -> Row:
    """The metrics of an evaluation that the server expects.

    Args:
        content: one client's records.
        ranges: the expected metrics and their limits.

    Returns:
        The metrics in the order of `ranges`, and `NOT_FINITE` if the client's model has diverged.

    Raises:
        Refused: a metric is missing or outside its limits.
    """
    record = content.get(METRICS)
    if not isinstance(record, MetricRecord):
        raise Refused(f"no record '{METRICS}'")
    row: Row = {}
    for name in ranges:
        value = record.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise Refused(f"'{name}' is missing or not a number")
        row[name] = value
    for name, (low, high) in ranges.items():
        highest = row[high] if isinstance(high, str) else high
        # Written with `not`, so that a NaN is refused: comparisons with NaN are false.
        if not low <= row[name] <= highest:
            raise Refused(f"'{name}' is {row[name]:g}, outside {low:g} to {highest:g}")
    if record.get(NOT_FINITE):
        # Whatever a client writes there, it marks its own accuracy and nothing else.
        row[NOT_FINITE] = 1
    return row
