"""Which replies count: every byte of a reply is a peer's, so nothing in it is taken on trust.

A reply is data, never code: arrays are read without pickle, their labels are compared with their
bytes, and sizes are bounded before anything is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]
ARRAYS, METRICS, CONFIG, RECEIVED = "arrays", "metrics", "config", "received"
"""Names of the records in our messages; `received` is what one client alone is sent."""
MAX_EXAMPLES = 10**9
MAX_METRICS = 100
LONGEST_REASON = 300
"""Characters of a reason that are shown: some of them are a peer's."""
NUMPY = "numpy.ndarray"
"""Flower's name for an array in NumPy's own file format."""
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


def to_arrays(record: ArrayRecord) -> Arrays:
    """NumPy arrays of a record, by name; each a copy of its own."""
    return {name: values_of(array) for name, array in record.items()}


def to_record(arrays: Mapping[str, NDArray[Any]]) -> ArrayRecord:
    """A record of NumPy arrays, by name."""
    return ArrayRecord({name: to_array(values) for name, values in arrays.items()})


def to_array(values: NDArray[Any]) -> Array:
    """Flower's `Array(values)`, byte for byte; for float32 without NumPy's slow header writer."""
    if values.dtype != np.float32:
        return Array(np.ascontiguousarray(values))
    shape = tuple(values.shape)
    data = _float32_header(shape) + values.tobytes()
    return Array(dtype="float32", shape=shape, stype=NUMPY, data=data)


def values_of(array: Array) -> NDArray[Any]:
    """Flower's `array.numpy()`: a new array, read without pickle.

    Parsing the header takes most of its time. Here it is compared with the one that NumPy writes
    for the labelled shape; anything else goes to NumPy's own reader.

    Raises:
        Exception: of many types, for foreign bytes.
    """
    if array.dtype == "float32" and array.stype == NUMPY:
        shape, data = tuple(array.shape), array.data
        header = _float32_header(shape)
        if data.startswith(header) and len(data) == len(header) + 4 * math.prod(shape):
            return np.frombuffer(data, np.float32, offset=len(header)).reshape(shape).copy()
    return array.numpy()


@lru_cache(maxsize=256)
def _float32_header(shape: tuple[int, ...]) -> bytes:
    """What `np.save` writes in front of the numbers of a float32 array in C order."""
    buffer = BytesIO()
    layout = {"descr": np.dtype(np.float32).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, layout)
    return buffer.getvalue()


def reply_fault(
    reply: Message, shapes: Mapping[str, tuple[int, ...]], max_norm: float
) -> str | None:
    """Why a train reply must not count, or None."""
    if reply.has_error():
        return why(reply)
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


def shown(reason: str) -> str:
    """A reason on one line, without control characters, cut where it is long."""
    clean = "".join(c if c.isprintable() else "?" for c in reason)
    return clean if len(clean) <= LONGEST_REASON else clean[: LONGEST_REASON - 3] + "..."


def why(reply: Message) -> str:
    """One line about a reply that is an error, or that nobody asked for."""
    if not reply.has_error():
        return f"unexpected reply from node {reply.metadata.src_node_id}"
    return " ".join((reply.error.reason or f"error {reply.error.code}").split())
