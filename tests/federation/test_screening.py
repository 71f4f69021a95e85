"""Which replies count, and which evaluations."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

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

from fedprompt.federation.screening import MAX_EXAMPLES
from fedprompt.messages import from_wire, to_arrays, to_record, to_wire
from fedprompt.strategies.fedavg import FedAvgConfig
from tests.support.strategies import (
    GRID,
    NODE,
    Values,
    answer,
    full,
    send,
    shared_after,
    strategy_of_clients,
)

# Training


def raw(data: bytes, dtype: str = "float32", shape: tuple[int, ...] = (2, 2)) -> Array:
    return Array(dtype, shape, "numpy.ndarray", data)


def npy(array: NDArray[Any], **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def npy_header(text: str) -> bytes:
    header = text.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("arr_0.npy", npy(full(1)))
    return buffer.getvalue()


class Boom:
    """Leaves a trace when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def with_arrays(arrays: Mapping[str, Values | Array]) -> Callable[[Message], list[Message]]:
    return lambda message: [answer(message, arrays)]


def with_array(array: Values | Array) -> Callable[[Message], list[Message]]:
    return with_arrays({"ctx": array})


def with_examples(examples: Any) -> Callable[[Message], list[Message]]:
    return lambda message: [answer(message, {"ctx": full(1)}, examples)]


def with_records(**records: Any) -> Callable[[Message], list[Message]]:
    return lambda message: [Message(RecordDict(records), reply_to=message)]


GOOD = ArrayRecord({"ctx": Array(full(1))})
HUGE = "{'descr': '<f4', 'fortran_order': False, 'shape': (%s,), }"
BAD: dict[str, tuple[Callable[[Message], list[Message]], str]] = {
    "error": (lambda m: [Message(Error(2, "out of\nmemory"), reply_to=m)], "out of memory"),
    "no reply": (lambda m: [], "no reply"),
    "NaN": (with_array(full(float("nan"))), "not finite"),
    "inf": (with_array(np.array([[0, 0], [0, np.inf]], np.float32)), "not finite"),
    "-inf": (with_array(np.array([[0, -np.inf], [0, 0]], np.float32)), "not finite"),
    "wrong key": (with_arrays({"context": full(1)}), "['context'] instead of ['ctx']"),
    "extra key": (with_arrays({"ctx": full(1), "b": full(1)}), "['b', 'ctx'] instead of"),
    "no tensors": (with_arrays({}), "[] instead of ['ctx']"),
    "no record": (with_records(metrics=MetricRecord({"num-examples": 1})), "records ['metrics']"),
    "no metrics": (with_records(arrays=GOOD), "records ['arrays']"),
    "extra record": (
        with_records(arrays=GOOD, metrics=MetricRecord({"num-examples": 1}), config=ConfigRecord()),
        "records ['arrays', 'config', 'metrics']",
    ),
    "swapped records": (
        with_records(arrays=MetricRecord({"num-examples": 1}), metrics=GOOD),
        "wrong kind",
    ),
    "wrong shape": (with_array(full(1, (2, 3))), "float32 (2, 3), not float32 (2, 2)"),
    "flat": (with_array(full(1, (4,))), "float32 (4,)"),
    "wrong dtype": (with_array(np.ones((2, 2))), "float64 (2, 2), not float32"),  # type: ignore[arg-type]
    "huge norm": (with_array(full(5001.0)), "norm 1e+04, above max_norm=10000"),
    "largest float": (with_array(full(3.4e38)), "norm 6.8e+38"),
    "no images": (with_examples(0), "num-examples is 0"),
    "negative": (with_examples(-5), "num-examples is -5"),
    "float": (with_examples(2.0), "num-examples is 2.0, not a whole number"),
    "list": (with_examples([2]), "at most 100 numbers are read"),
    "absurd": (with_examples(2**62), f"outside 1..{MAX_EXAMPLES}"),
    "not said": (
        with_records(arrays=GOOD, metrics=MetricRecord({"loss": 1.0})),
        "num-examples is None",
    ),
    "twice": (lambda m: [answer(m, {"ctx": full(v)}) for v in (1, 2)], "replied 2 times"),
    "garbage": (with_array(raw(b"garbage")), "'ctx' cannot be read"),
    "empty": (with_array(raw(b"")), "'ctx' cannot be read"),
    "cut off": (with_array(raw(npy(full(1))[:-3])), "'ctx' cannot be read"),
    "header only": (with_array(raw(npy_header(HUGE % "4"))), "'ctx' cannot be read"),
    "too large to allocate": (with_array(raw(npy_header(HUGE % 10**15))), "'ctx' cannot be read"),
    "overflowing": (with_array(raw(npy_header(HUGE % 2**63))), "'ctx' cannot be read"),
    "nonsense header": (with_array(raw(npy_header("{"))), "'ctx' cannot be read"),
    "other bytes": (with_array(raw(npy(np.ones((2, 2))))), "holds float64 (2, 2) behind its label"),
    "other shape": (with_array(raw(npy(full(1, (4,))))), "holds float32 (4,) behind its label"),
    "big-endian": (with_array(raw(npy(full(1).astype(">f4")))), "holds >f4 (2, 2) behind"),
    "many bytes": (with_array(raw(npy(full(1, (2000,))))), "holds 8128 bytes, too many"),
    "zip": (with_array(raw(zipped())), "holds a NpzFile behind its label"),
    "bare pickle": (with_array(raw(pickle.dumps([1.0] * 4))), "'ctx' cannot be read"),
    "no numpy": (
        with_array(Array("float32", (2, 2), "torch.Tensor", npy(full(1)))),
        "'ctx' cannot be read: TypeError",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_reply_is_dropped_counted_and_named(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    reply_badly, reason = BAD[kind]
    strategy = strategy_of_clients(3)
    zero, one, two = send(strategy, {"ctx": full(0.0)})
    replies = [
        *reply_badly(one),
        answer(two, {"ctx": full(4)}, 3),
        answer(zero, {"ctx": full(8)}, 1),
    ]
    # As over a network: nothing but bytes arrives.
    extras = [from_wire(to_wire(r)) for r in replies]
    arrays, metrics = strategy.aggregate_train(1, extras)
    assert arrays is not None
    assert to_arrays(arrays)["ctx"].tolist() == [[5.0, 5.0], [5.0, 5.0]]
    assert metrics is not None
    assert dict(metrics) == {"sampled": 3, "accepted": 2, "rejected": 1}
    assert list(strategy.rejected) == [1]
    assert reason in strategy.rejected[1]
    assert "\n" not in strategy.rejected[1]
    assert f"client 1: reply dropped: {strategy.rejected[1]}" in caplog.text


def test_true_is_not_a_number_of_images() -> None:
    # Flower's record turns True away itself; a reply that got past it must not count either.
    strategy = strategy_of_clients(1)
    (message,) = send(strategy, {"ctx": full(0.0)})
    reply = answer(message, {"ctx": full(1)}, 1)
    dict.__setitem__(reply.content["metrics"].__dict__["_data"], "num-examples", True)
    assert reply.content["metrics"]["num-examples"] is True
    assert shared_after(strategy, [reply]) is None
    assert strategy.rejected == {0: "num-examples is True, not a whole number"}


def test_pickled_objects_are_never_unpickled(tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    data = npy(np.array([Boom(trace)] * 4, dtype=object).reshape(2, 2), allow_pickle=True)
    strategy = strategy_of_clients(2)
    one, two = send(strategy, {"ctx": full(0.0)})
    after = shared_after(strategy, [answer(one, {"ctx": raw(data)}), answer(two, {"ctx": full(4)})])
    assert after is not None
    assert after["ctx"].tolist() == [[4.0, 4.0], [4.0, 4.0]]
    assert "cannot be read" in strategy.rejected[0]
    assert not trace.exists()
    np.load(io.BytesIO(data), allow_pickle=True)
    assert trace.exists(), "the same bytes do execute where pickles are allowed"


def test_the_largest_allowed_norm_and_count_pass() -> None:
    strategy = strategy_of_clients(2, config=FedAvgConfig(max_norm=2.0))
    one, two = send(strategy, {"ctx": full(0.0)})
    replies = [answer(one, {"ctx": full(1)}, MAX_EXAMPLES), answer(two, {"ctx": full(1.001)}, 1)]
    after = shared_after(strategy, replies)
    assert after is not None
    assert after["ctx"].tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert strategy.rejected == {1: "'ctx' has norm 2, above max_norm=2"}


def test_who_was_not_sampled_does_not_count() -> None:
    strategy = strategy_of_clients(4, fraction=0.5)
    messages = send(strategy, {"ctx": full(0.0)})
    stranger = min(set(range(4)) - set(strategy.sampled))
    uninvited = Message(RecordDict(), dst_node_id=NODE + stranger, message_type=MessageType.TRAIN)
    replies = [answer(uninvited, {"ctx": full(100)}, 1000)]
    replies += [answer(m, {"ctx": full(2)}) for m in messages]
    after = shared_after(strategy, replies)
    assert after is not None
    assert after["ctx"].tolist() == [[2.0, 2.0], [2.0, 2.0]]
    assert strategy.rejected == {stranger: "was not asked to train"}


def test_an_unknown_node_does_not_count(caplog: pytest.LogCaptureFixture) -> None:
    strategy = strategy_of_clients(2)
    messages = send(strategy, {"ctx": full(0.0)})
    unknown = Message(RecordDict(), dst_node_id=9, message_type=MessageType.TRAIN)
    replies = [answer(unknown, {"ctx": full(100)}, 1000), answer(messages[0], {"ctx": full(2)})]
    after = shared_after(strategy, replies)
    assert after is not None
    assert after["ctx"].tolist() == [[2.0, 2.0], [2.0, 2.0]]
    assert strategy.rejected == {1: "no reply"}
    assert "node 9 is no client" in caplog.text


def test_flowers_word_for_a_lost_node_names_the_client() -> None:
    strategy = strategy_of_clients(2)
    messages = send(strategy, {"ctx": full(0.0)})
    lost = Message(RecordDict(), dst_node_id=1, message_type=MessageType.TRAIN)
    replies = [Message(Error(3, "Node Unavailable"), reply_to=lost)]
    replies.append(answer(messages[1], {"ctx": full(2)}))
    assert shared_after(strategy, replies) is not None
    assert strategy.rejected == {0: "Node Unavailable"}


def test_too_few_valid_replies_change_nothing(caplog: pytest.LogCaptureFixture) -> None:
    for min_replies, counts in ((2, True), (3, False)):
        strategy = strategy_of_clients(3, min_replies=min_replies)
        zero, one, _ = send(strategy, {"ctx": full(0.0)})
        replies = [answer(zero, {"ctx": full(1)}), answer(one, {"ctx": full(3)})]
        assert (shared_after(strategy, replies) is not None) == counts
    assert "2 valid replies of 3, fewer than min_replies=3" in caplog.text


def test_a_client_that_boasts_is_dropped() -> None:
    strategy = strategy_of_clients(4)
    messages = send(strategy, {"ctx": full(0.0)})
    images = [10, 10**6, 20, 30]
    replies = [
        answer(m, {"ctx": full(float(k == 1))}, n)
        for k, (m, n) in enumerate(zip(messages, images, strict=True))
    ]
    after = shared_after(strategy, replies)
    assert after is not None
    assert after["ctx"].tolist() == full(0.0).tolist()
    assert list(strategy.rejected) == [1]
    assert "above max_examples_ratio=1000 times the median" in strategy.rejected[1]


def test_claims_decide_nothing_where_clients_count_alike() -> None:
    for name in ("median", "trimmed_mean", "krum", "multi_krum"):
        strategy = strategy_of_clients(4, name)
        messages = send(strategy, {"ctx": full(0.0)})
        images = [1, 1, 10**6, 10**6]
        replies = [answer(m, {"ctx": full(0.1)}, n) for m, n in zip(messages, images, strict=True)]
        strategy.aggregate_train(1, replies)
        assert strategy.rejected == {}, name


def test_reasons_are_short_and_printable() -> None:
    strategy = strategy_of_clients(2)
    one, two = send(strategy, {"ctx": full(0.0)})
    evil = {f"\x1b[31m{'x' * 10_000}": full(1.0)}
    assert shared_after(strategy, [answer(one, evil), answer(two, {"ctx": full(1.0)})]) is not None
    assert len(strategy.rejected[0]) <= 300
    assert strategy.rejected[0].isprintable()


# Evaluation


def evaluation(message: Message, **metrics: Any) -> Message:
    metrics = {k.replace("_", "-"): v for k, v in metrics.items()}
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)


def test_evaluations_are_sorted_by_client() -> None:
    strategy = strategy_of_clients(3, fraction=0.3)
    sent = strategy.configure_evaluate(2, to_record({"ctx": full(1)}), ConfigRecord(), GRID)
    messages = list(sent)
    assert [m.metadata.dst_node_id for m in messages] == [NODE, NODE + 1, NODE + 2]
    assert {m.metadata.message_type for m in messages} == {MessageType.EVALUATE}
    replies = [
        evaluation(m, num_examples=10 + c, correct=c, loss_sum=0.5) for c, m in enumerate(messages)
    ]
    table = strategy.aggregate_evaluate(2, [replies[2], replies[0], replies[1]])
    assert table is not None
    assert dict(table) == {
        "client-ids": [0, 1, 2],
        "num-examples": [10, 11, 12],
        "correct": [0, 1, 2],
        "loss-sum": [0.5, 0.5, 0.5],
    }


@pytest.mark.parametrize(
    "reply_badly",
    [
        lambda m: Message(Error(2, "lost"), reply_to=m),
        lambda m: Message(RecordDict(), reply_to=m),
        lambda m: Message(RecordDict({"metrics": ConfigRecord()}), reply_to=m),
        lambda m: evaluation(m),
        lambda m: evaluation(m, num_examples=4),
        lambda m: evaluation(m, num_examples=4, correct=2, extra=1),
        lambda m: evaluation(m, num_examples=4, correct=2, zeal=1),
        lambda m: evaluation(m, num_examples=4, correct=5),
        lambda m: evaluation(m, num_examples=-4, correct=-5),
        lambda m: evaluation(m, num_examples=4, correct=float("nan")),
        lambda m: evaluation(m, num_examples=[4], correct=2),
    ],
)
def test_a_bad_evaluation_is_left_out(reply_badly: Callable[[Message], Message]) -> None:
    strategy = strategy_of_clients(3)
    sent = strategy.configure_evaluate(1, to_record({"ctx": full(1)}), ConfigRecord(), GRID)
    zero, one, two = sent
    good = [evaluation(m, num_examples=4, correct=2) for m in (zero, two)]
    table = strategy.aggregate_evaluate(1, [reply_badly(one), *good])
    assert table is not None
    assert dict(table) == {"client-ids": [0, 2], "num-examples": [4, 4], "correct": [2, 2]}
    assert strategy.aggregate_evaluate(1, [Message(Error(2, "lost"), reply_to=zero)]) is None
