"""Messages as bytes: the quick ways write and read exactly what Flower's own ways do."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from numpy.typing import NDArray

from fedprompt.messages import (
    become_server,
    client_of,
    failure,
    from_wire,
    node_of,
    to_array,
    to_parcels,
    to_wire,
    values_of,
)


@pytest.fixture(autouse=True)
def _identity() -> None:
    become_server()


def content(value: float = 0.5) -> RecordDict:
    values = np.full((4, 512), value, np.float32)
    return RecordDict(
        {
            "arrays": ArrayRecord({"ctx": Array(values), "bias": Array(values[0])}),
            "config": ConfigRecord({"server-round": 3, "note": "a", "list": [1.5, 2.5]}),
            "metrics": MetricRecord({"loss": 0.25}),
        }
    )


def message(records: RecordDict, client: int, kind: str = MessageType.TRAIN) -> Message:
    return Message(records, dst_node_id=node_of(client), message_type=kind, group_id="3")


def test_spliced_bytes_are_those_of_to_wire() -> None:
    common = content()
    messages = [message(common, 0), message(content(0.7), 1), message(common, 2)]
    messages.append(message(RecordDict(), 3, MessageType.QUERY))
    messages.append(Message(Error(2, "broken"), reply_to=messages[0]))
    parcels = to_parcels(messages)
    for sent, parcel in zip(messages, parcels, strict=True):
        wire = to_wire(sent)
        assert parcel.head + parcel.body == wire
        assert parcel.size == len(wire)
        assert parcel.client == client_of(sent.metadata.dst_node_id)
    assert len({m.metadata.message_id for m in messages}) == len(messages)


def test_a_common_content_is_written_once_but_opened_for_each_client() -> None:
    common = content()
    first, second = to_parcels([message(common, 0), message(common, 1)])
    assert first.body is second.body
    one, other = first.open(), second.open()
    assert (one.metadata.dst_node_id, other.metadata.dst_node_id) == (node_of(0), node_of(1))
    one.content["arrays"].clear()  # type: ignore[attr-defined]
    assert set(other.content["arrays"]) == {"ctx", "bias"}  # type: ignore[arg-type]
    assert to_wire(other) == second.head + second.body


def test_equal_contents_that_are_two_objects_are_not_mixed_up() -> None:
    parcels = to_parcels(message(content(float(k)), k) for k in range(50))
    for k, parcel in enumerate(parcels):
        assert parcel.open().content["arrays"]["ctx"].numpy()[0, 0] == k  # type: ignore[index]


def test_failure_names_the_client_and_the_reason() -> None:
    reply = from_wire(failure(to_parcels([message(content(), 7)])[0].open(), "disk full"))
    assert reply.metadata.src_node_id == node_of(7)
    assert reply.error.reason == "disk full"


ARRAYS = [
    np.arange(6, dtype=np.float32).reshape(2, 3),
    np.arange(12, dtype=np.float32).reshape(3, 4).T,
    np.arange(12, dtype=np.float32)[::2],
    np.full((), 3, np.float32),
    np.zeros((0, 4), np.float32),
    np.arange(6, dtype=np.float64).reshape(2, 3),
    np.arange(6, dtype=">f4"),
    np.arange(3),
]


@pytest.mark.parametrize("values", ARRAYS, ids=lambda a: f"{a.dtype.str}{a.shape}")
def test_arrays_are_flowers_own_bytes(values: NDArray[np.float32]) -> None:
    ours, flowers = to_array(values), Array(np.asarray(values, order="C"))
    assert ours == flowers
    assert ours.data == flowers.data
    for array in (ours, flowers, Array(values)):
        read = values_of(array)
        assert read.dtype == values.dtype
        assert read.shape == values.shape
        assert read.tobytes() == values.tobytes()
        assert read.flags.writeable


def test_reading_gives_a_copy() -> None:
    array = to_array(np.zeros(3, np.float32))
    values_of(array)[:] = 1
    assert values_of(array).tolist() == [0, 0, 0]


@pytest.mark.parametrize("cut", [1, 4, 100])
def test_what_numpys_reader_refuses_is_refused(cut: int) -> None:
    whole = to_array(np.ones((4, 8), np.float32))
    short = Array(dtype="float32", shape=(4, 8), stype=whole.stype, data=whole.data[:-cut])
    with pytest.raises(ValueError, match=r"cannot reshape|EOF|array of size"):
        values_of(short)


def test_a_label_that_differs_from_the_bytes_does_not_decide() -> None:
    """Bytes for (2, 8) labelled (4, 4): NumPy's reader gives what the bytes hold."""
    whole = to_array(np.ones((2, 8), np.float32))
    assert values_of(Array("float32", (4, 4), whole.stype, whole.data)).shape == (2, 8)
    with pytest.raises(TypeError, match="serialization type"):
        values_of(Array("float32", (2, 8), "pickle", whole.data))
