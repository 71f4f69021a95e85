"""Decides which replies count, on the server, after every exchange of messages.

Every byte of a reply comes from a client, so nothing in it is trusted.

A reply is data and never code: arrays are read without pickle, their labels are compared with their
bytes, and sizes are bounded before anything is read. Flower's own strategies check nothing: one NaN
spreads to all clients, and one wrong shape ends the run.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord

from fedprompt.messages import (
    ARRAYS,
    METRICS,
    Exchanged,
    Update,
    error_reason,
    sanitised,
    to_arrays,
    values_of,
)

__all__ = ["Limits", "Row", "Update", "reply_fault", "screen_evaluations", "screen_replies"]

log = logging.getLogger("fedprompt.strategy")

MAX_EXAMPLES = 10**9
"""Largest number of images that a client may report."""
MAX_METRICS = 100
"""Largest number of metrics that are read from a reply."""
HEADER_BYTES = 4096
"""An upper bound of the header that NumPy writes before an array."""
# `num-examples` is the name that Flower's own strategies use.
TEST_COUNTS = ("num-examples", "correct")
"""Evaluation metrics of a client's test images: how many there are, and how many were right."""
VALIDATION_COUNTS = ("validation-tested", "validation-correct")
"""Likewise for its validation images."""
COMMON_COUNTS = ("common-tested", "common-correct")
"""Likewise for the server's test images."""

Row = dict[str, int | float]
"""One client's evaluation metrics, by name."""


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


def screen_replies(
    replies: Sequence[Message],
    asked: Sequence[int],
    client_of_node: Mapping[int, int],
    limits: Limits,
    *,
    server_round: int,
) -> Exchanged:
    """Check the training replies of a round; each bad one is dropped, counted and named.

    Args:
        replies: what came in time, in any order.
        asked: ids of the clients that were asked to train.
        client_of_node: client of every known node.
        limits: what a reply must respect.
        server_round: the round, for log messages.

    Returns:
        The valid updates sorted by client id. There are none if fewer than `limits.min_replies` are
        valid.
    """
    by_client, lost = _replies_by_client(replies, client_of_node)
    expected = set(asked)
    read: list[tuple[Update, dict[str, float]]] = []
    dropped: dict[int, str] = {}
    for client, from_client in sorted(by_client.items()):
        fault = _fault(from_client, limits) if client in expected else "was not asked to train"
        if fault is None:
            read.append(read_update(client, from_client[0]))
        else:
            dropped[client] = sanitised(fault)
    dropped |= _inflated_counts([update for update, _ in read], limits.max_examples_ratio)
    for client in sorted(expected - set(by_client)):
        # Errors of lost nodes name no client, so they are assigned to the silent clients in turn.
        dropped[client] = sanitised(lost.pop(0)) if lost else "no reply"
    dropped = dict(sorted(dropped.items()))
    for client, reason in dropped.items():
        log.warning("client %d: reply dropped: %s", client, reason)
    accepted = [(update, losses) for update, losses in read if update.client not in dropped]
    updates = [update for update, _ in accepted]
    mean_losses = _mean_losses(updates, [losses for _, losses in accepted])
    if len(updates) < limits.min_replies:
        log.warning(
            "round %d: %d valid replies of %d, fewer than min_replies=%d: nothing aggregated",
            server_round,
            len(updates),
            len(asked),
            limits.min_replies,
        )
        return Exchanged([], len(updates), dropped, mean_losses)
    return Exchanged(updates, len(updates), dropped, mean_losses)


def _replies_by_client(
    replies: Iterable[Message], client_of_node: Mapping[int, int]
) -> tuple[dict[int, list[Message]], list[str]]:
    """Replies of each known client, and the reasons of errors that name no client."""
    by_client: dict[int, list[Message]] = {}
    lost: list[str] = []
    for reply in replies:
        client = client_of_node.get(reply.metadata.src_node_id)
        if client is not None:
            by_client.setdefault(client, []).append(reply)
        elif reply.has_error():
            # Flower answers for a lost node under the server's id, so the client is unknown here.
            lost.append(error_reason(reply))
        else:
            log.warning("node %d is no client: reply ignored", reply.metadata.src_node_id)
    return by_client, lost


def _fault(replies: Sequence[Message], limits: Limits) -> str | None:
    """Why the replies of a client that was asked must not count, or None."""
    if len(replies) > 1:
        # Which of them counts would depend on the order in which they came.
        return f"replied {len(replies)} times"
    return reply_fault(replies[0], limits.shapes, limits.max_norm)


def _inflated_counts(updates: Sequence[Update], max_ratio: float) -> dict[int, str]:
    """Why updates that claim far more images than the others must not count, by client."""
    images = sorted(u.num_examples for u in updates)
    # The lower median: of two clients, one cannot raise it.
    limit = max_ratio * images[(len(images) - 1) // 2] if images else 0.0
    return {
        u.client: f"num-examples is {u.num_examples}, above max_examples_ratio={max_ratio:g} times "
        "the median"
        for u in updates
        if u.num_examples > limit
    }


def _mean_losses(
    updates: Sequence[Update], losses: Sequence[Mapping[str, float]]
) -> dict[str, float]:
    """Means, weighted by images, of the losses that all clients report."""
    if not updates:
        return {}
    weights = np.array([u.num_examples for u in updates], dtype=np.float64)
    means = {}
    for name in sorted(set.intersection(*(set(m) for m in losses))):
        values = np.array([m[name] for m in losses], dtype=np.float64)
        means[name] = float((values * weights).sum() / weights.sum())
    return means


def reply_fault(
    reply: Message, shapes: Mapping[str, tuple[int, ...]], max_norm: float
) -> str | None:
    """Check one training reply.

    Args:
        reply: one client's reply.
        shapes: name and shape of every shared tensor; all are float32.
        max_norm: largest L2 norm of a tensor.

    Returns:
        Why the reply must not count, or None if it is valid.
    """
    if reply.has_error():
        return error_reason(reply)
    # Read after the check for an error: Flower raises if an error's content is read.
    content = reply.content
    if set(content) != {ARRAYS, METRICS}:
        return f"records {sorted(content)} instead of ['{ARRAYS}', '{METRICS}']"
    record, metrics = content[ARRAYS], content[METRICS]
    if not isinstance(record, ArrayRecord) or not isinstance(metrics, MetricRecord):
        return "records of the wrong kind"
    if set(record) != set(shapes):
        return f"tensors {sorted(record)} instead of {sorted(shapes)}"
    for name, shape in shapes.items():
        reason = _array_fault(record[name], tuple(shape), max_norm)
        if reason:
            return f"'{name}' {reason}"
    if len(metrics) > MAX_METRICS or any(isinstance(v, list) for v in metrics.values()):
        return f"{len(metrics)} metrics; at most {MAX_METRICS} numbers are read"
    examples = metrics.get("num-examples")
    # `True` is an `int` in Python.
    if isinstance(examples, bool) or not isinstance(examples, int):
        return f"num-examples is {examples!r}, not a whole number"
    if not 0 < examples <= MAX_EXAMPLES:
        return f"num-examples is {examples}, outside 1..{MAX_EXAMPLES}"
    return None


def _array_fault(array: Array, shape: tuple[int, ...], max_norm: float) -> str | None:
    """Why a tensor must not count, or None; neither its label nor its bytes are trusted."""
    if array.dtype != "float32" or tuple(array.shape) != shape:
        return f"is {array.dtype} {tuple(array.shape)}, not float32 {shape}"
    # Checked before anything is parsed, so that a reply cannot exhaust the memory.
    if len(array.data) > 4 * math.prod(shape) + HEADER_BYTES:
        return f"holds {len(array.data)} bytes, too many for float32 {shape}"
    try:
        values: Any = values_of(array)
    except Exception as error:  # malformed bytes make NumPy raise errors of many types
        return f"cannot be read: {type(error).__name__}: {' '.join(str(error).split())[:100]}"
    if not isinstance(values, np.ndarray):
        return f"holds a {type(values).__name__} behind its label"
    if values.dtype != np.float32 or values.shape != shape:
        return f"holds {values.dtype} {values.shape} behind its label"
    # Squares of float32 numbers cannot overflow in float64, so the norm is finite exactly if all
    # numbers are.
    norm = float(np.linalg.norm(values.astype(np.float64)))
    if not math.isfinite(norm):
        return "holds values that are not finite"
    return f"has norm {norm:.3g}, above max_norm={max_norm:g}" if norm > max_norm else None


def read_update(client: int, reply: Message) -> tuple[Update, dict[str, float]]:
    """Read a reply that `reply_fault` has accepted.

    Args:
        client: id of the client that sent it.
        reply: the reply.

    Returns:
        The update, and the finite losses by name; losses that are not finite are left out.
    """
    metrics = reply.content[METRICS]
    examples = metrics["num-examples"]
    losses = {
        k: float(v)
        for k, v in metrics.items()
        if k.startswith("loss") and isinstance(v, (int, float)) and math.isfinite(v)
    }
    arrays = to_arrays(reply.content[ARRAYS])  # type: ignore[arg-type]
    return Update(client, arrays, int(examples)), losses  # type: ignore[arg-type]


def screen_evaluations(
    replies: Iterable[Message], client_of_node: Mapping[int, int], *, server_round: int
) -> dict[int, Row]:
    """Check the evaluation replies of a round; bad ones are dropped and logged.

    Args:
        replies: what came in time, in any order.
        client_of_node: client of every known node.
        server_round: the round, for log messages.

    Returns:
        Metrics by client id, ascending. All rows have the names that most of the replies have, and
        a metric is either an integer in all rows or a float in all rows.
    """
    rows: dict[int, Row] = {}
    for reply in replies:
        client = client_of_node.get(reply.metadata.src_node_id)
        if client is None or reply.has_error():
            reason = error_reason(reply)
            log.warning("round %d: a client could not evaluate: %s", server_round, reason)
            continue
        row = evaluation_row(reply)
        if row is None or client in rows:
            log.warning("round %d: client %d: evaluation dropped", server_round, client)
            continue
        rows[client] = row
    counts = Counter(tuple(sorted(row)) for row in rows.values())
    # A tie is broken by the names, so that the order of replies does not matter.
    names = max(counts, key=lambda n: (counts[n], n), default=())
    for client in [c for c, row in rows.items() if tuple(sorted(row)) != names]:
        log.warning("round %d: client %d: evaluation dropped", server_round, client)
        del rows[client]
    for name in names:
        # A client may send either kind of number, and Flower's records take no list of both.
        if not all(isinstance(row[name], int) for row in rows.values()):
            for row in rows.values():
                row[name] = float(row[name])
    return dict(sorted(rows.items()))


def evaluation_row(reply: Message) -> Row | None:
    """An evaluation's metrics, or None unless all are finite and no part exceeds its whole."""
    record = reply.content.get(METRICS)
    if not isinstance(record, MetricRecord):
        return None
    row = {k: v for k, v in record.items() if isinstance(v, (int, float)) and math.isfinite(v)}
    if len(row) != len(record) or not row:
        return None
    for whole, part in (TEST_COUNTS, VALIDATION_COUNTS, COMMON_COUNTS):
        # A missing half becomes -1 and fails the comparison.
        if (part in row or whole in row) and not 0 <= row.get(part, -1) <= row.get(whole, -1):
            return None
    return row
