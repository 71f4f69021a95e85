"""Which replies count: every byte of a reply is a peer's, so nothing in it is taken on trust.

A reply is data, never code: arrays are read without pickle, their labels are compared with their
bytes, and sizes are bounded before anything is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord

from fedprompt.messages import ARRAYS, METRICS, Arrays, error_reason, to_arrays, values_of

MAX_EXAMPLES = 10**9
MAX_METRICS = 100
HEADER_BYTES = 4096
"""More than NumPy's header in front of an array takes."""
SHARES = (("correct", "num-examples"), ("common-correct", "common-tested"))
"""Evaluation metrics where the first is a part of the second."""


@dataclass(frozen=True)
class Update:
    """One client's checked reply: its shared tensors and how many images they were trained on."""

    client: int
    arrays: Arrays
    num_examples: int


def reply_fault(
    reply: Message, shapes: Mapping[str, tuple[int, ...]], max_norm: float
) -> str | None:
    """Why a train reply must not count, or None."""
    if reply.has_error():
        return error_reason(reply)
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
    if isinstance(examples, bool) or not isinstance(examples, int):
        return f"num-examples is {examples!r}, not a whole number"
    if not 0 < examples <= MAX_EXAMPLES:
        return f"num-examples is {examples}, outside 1..{MAX_EXAMPLES}"
    return None


def _array_fault(array: Array, shape: tuple[int, ...], max_norm: float) -> str | None:
    """Why a tensor must not count, or None; its label and its bytes are both unchecked so far."""
    if array.dtype != "float32" or tuple(array.shape) != shape:
        return f"is {array.dtype} {tuple(array.shape)}, not float32 {shape}"
    if len(array.data) > 4 * math.prod(shape) + HEADER_BYTES:
        return f"holds {len(array.data)} bytes, too many for float32 {shape}"
    try:
        values: Any = values_of(array)
    except Exception as error:  # foreign bytes make NumPy raise errors of many types
        return f"cannot be read: {type(error).__name__}: {' '.join(str(error).split())[:100]}"
    if not isinstance(values, np.ndarray):
        return f"holds a {type(values).__name__} behind its label"
    if values.dtype != np.float32 or values.shape != shape:
        return f"holds {values.dtype} {values.shape} behind its label"
    # Squares of float32 numbers cannot overflow in float64: the norm is finite where they all are.
    norm = float(np.linalg.norm(values.astype(np.float64)))
    if not math.isfinite(norm):
        return "holds values that are not finite"
    return f"has norm {norm:.3g}, above max_norm={max_norm:g}" if norm > max_norm else None


def evaluation_row(reply: Message) -> dict[str, int | float] | None:
    """An evaluation's metrics: finite numbers, no part larger than its whole; else None."""
    record = reply.content.get(METRICS)
    if not isinstance(record, MetricRecord):
        return None
    row = {k: v for k, v in record.items() if isinstance(v, (int, float)) and math.isfinite(v)}
    if len(row) != len(record) or not row:
        return None
    for part, whole in SHARES:
        if (part in row or whole in row) and not 0 <= row.get(part, -1) <= row.get(whole, -1):
            return None
    return row


def read_update(client: int, reply: Message) -> tuple[Update, dict[str, float]]:
    """The update of a checked reply, and its finite losses by name."""
    metrics = reply.content[METRICS]
    examples = metrics["num-examples"]
    losses = {
        k: float(v)
        for k, v in metrics.items()
        if k.startswith("loss") and isinstance(v, (int, float)) and math.isfinite(v)
    }
    arrays = to_arrays(reply.content[ARRAYS])  # type: ignore[arg-type]
    return Update(client, arrays, int(examples)), losses  # type: ignore[arg-type]
