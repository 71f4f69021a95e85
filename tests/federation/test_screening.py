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

from fedprompt.federation.scores import personal_scores
from fedprompt.federation.screening import TEST_COUNTS, count_ranges, screen_evaluations
from fedprompt.federation.strategy import SharedPromptStrategy
from fedprompt.messages import (
    MAX_EXAMPLES,
    from_wire,
    to_arrays,
    to_record,
    to_wire,
)
from fedprompt.runtime.peer_text import LONGEST_REASON
from fedprompt.strategies.fedavg import FedAvgConfig
from tests.support.strategies import (
    GRID,
    NODE,
    Values,
    answer,
    content,
    full,
    send,
    shared_after,
    strategy_of_clients,
    with_ids,
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


def stray(node: int) -> Message:
    """A message of another exchange, which a node may still answer."""
    (message,) = with_ids([Message(RecordDict(), dst_node_id=node, message_type=MessageType.TRAIN)])
    return message


def forged(reply: Message, *, source: int | None = None, answers: str | None = None) -> Message:
    """A reply with other metadata than its sender's, which Flower lets a node write as it likes."""
    if source is not None:
        reply.metadata.__dict__["_src_node_id"] = source
    if answers is not None:
        reply.metadata.__dict__["_reply_to_message_id"] = answers
    return reply


@pytest.mark.parametrize("node", [NODE + 1, NODE + 9, 9])
def test_replies_to_other_messages_do_not_count(
    node: int, caplog: pytest.LogCaptureFixture
) -> None:
    strategy = strategy_of_clients(4, fraction=0.5)
    messages = send(strategy, {"ctx": full(0.0)})
    replies = [answer(stray(node), {"ctx": full(100)}, 1000)]
    replies += [answer(m, {"ctx": full(2)}) for m in messages]
    after = shared_after(strategy, replies)
    assert after is not None
    assert after["ctx"].tolist() == [[2.0, 2.0], [2.0, 2.0]]
    assert strategy.rejected == {}
    assert "1 replies" in caplog.text


def test_a_reply_is_the_answer_of_the_node_that_was_asked() -> None:
    strategy = strategy_of_clients(3)
    zero, one, two = send(strategy, {"ctx": full(0.0)})
    # Client 0 claims to be client 1, which is thereby neither replaced nor made to reply twice.
    replies = [forged(answer(zero, {"ctx": full(100)}), source=NODE + 1)]
    replies += [answer(one, {"ctx": full(2)}), answer(two, {"ctx": full(4)})]
    after = shared_after(strategy, replies)
    assert after is not None
    assert after["ctx"].tolist() == [[3.0, 3.0], [3.0, 3.0]]
    assert list(strategy.rejected) == [0]
    assert "another node" in strategy.rejected[0]


def test_an_absent_client_is_not_replaced() -> None:
    strategy = strategy_of_clients(2)
    zero, _ = send(strategy, {"ctx": full(0.0)})
    fake = forged(answer(zero, {"ctx": full(100)}), source=NODE + 1, answers="unknown")
    after = shared_after(strategy, [fake, answer(zero, {"ctx": full(2)})])
    assert after is not None
    assert after["ctx"].tolist() == [[2.0, 2.0], [2.0, 2.0]]
    assert strategy.rejected == {1: "no reply"}


def test_flowers_word_for_a_lost_node_names_the_client() -> None:
    strategy = strategy_of_clients(2)
    messages = send(strategy, {"ctx": full(0.0)})
    replies = [
        answer(messages[1], {"ctx": full(2)}),
        # Flower answers for a lost node under the server's own id.
        forged(Message(Error(3, "Node Unavailable"), reply_to=messages[0]), source=1),
    ]
    assert shared_after(strategy, replies) is not None
    assert strategy.rejected == {0: "Node Unavailable"}


class NotRecords:
    """An object in the place of a reply's records: Flower does not check what stands there."""


@pytest.mark.parametrize("content", [NotRecords(), None, [], GOOD, {"arrays": GOOD}])
def test_content_that_is_no_records_costs_its_sender_the_round(content: Any) -> None:
    strategy = strategy_of_clients(2)
    zero, one = send(strategy, {"ctx": full(0.0)})
    bad = answer(zero, {"ctx": full(9)})
    bad.__dict__["_content"] = content
    after = shared_after(strategy, [bad, answer(one, {"ctx": full(2)})])
    assert after is not None
    assert after["ctx"].tolist() == [[2.0, 2.0], [2.0, 2.0]]
    assert list(strategy.rejected) == [0]


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({}, {"loss": 2.0}),
        ({"loss": float("nan")}, {"loss": 2.0}),
        ({"loss": 1e308}, {"loss": 2.0}),
        ({"loss": 2.0, "loss-\x1b[2J": 1.0, "lossy": 1.0, f"loss-{'x' * 99}": 1.0}, {"loss": 2.0}),
        ({"loss": 2.0, "loss-own": 1.0}, {"loss": 2.0}),
    ],
)
def test_one_client_cannot_spoil_the_losses(
    losses: dict[str, float], expected: dict[str, float]
) -> None:
    strategy = strategy_of_clients(3)
    messages = send(strategy, {"ctx": full(0.0)})
    reported = [losses, {"loss": 1.0}, {"loss": 3.0}]
    replies = [
        Message(content({"ctx": full(1)}, **{"num-examples": 1000}, **named), reply_to=m)
        for m, named in zip(messages, reported, strict=True)
    ]
    _, metrics = strategy.aggregate_train(1, replies)
    assert metrics is not None
    assert {n: v for n, v in metrics.items() if n.startswith("loss")} == expected


def test_statistics_are_spread_over_clients_and_one_client_cannot_add_any() -> None:
    strategy = strategy_of_clients(3)
    messages = send(strategy, {"ctx": full(0.0)})
    reported: list[dict[str, float]] = [
        {"statistic-shift": 1.0, "statistic-own": 1.0},
        {"statistic-shift": 4.0, "statistic-\x1b[2J": 1.0},
        {"statistic-shift": float("nan")},
    ]
    replies = [
        Message(content({"ctx": full(1)}, **{"num-examples": n}, **named), reply_to=m)
        for m, named, n in zip(messages, reported, (10, 20, 30), strict=True)
    ]
    exchanged = strategy.screen(1, messages, replies)
    assert not exchanged.dropped
    assert exchanged.statistics == {"shift": {"mean": 3.0, "std": 1.5, "max": 4.0}}


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
    assert len(strategy.rejected[0]) <= LONGEST_REASON
    assert strategy.rejected[0].isprintable()


# Evaluation


def asked_to_evaluate(strategy: SharedPromptStrategy) -> list[Message]:
    arrays = to_record({"ctx": full(1)})
    return with_ids(strategy.configure_evaluate(1, arrays, ConfigRecord(), GRID))


def evaluation(message: Message, **metrics: Any) -> Message:
    metrics = {k.replace("_", "-"): v for k, v in metrics.items()}
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)


def test_evaluations_are_sorted_by_client() -> None:
    strategy = strategy_of_clients(3, fraction=0.3)
    messages = asked_to_evaluate(strategy)
    assert [m.metadata.dst_node_id for m in messages] == [NODE, NODE + 1, NODE + 2]
    assert {m.metadata.message_type for m in messages} == {MessageType.EVALUATE}
    replies = [evaluation(m, num_examples=10 + c, correct=c) for c, m in enumerate(messages)]
    table = strategy.aggregate_evaluate(1, [replies[2], replies[0], replies[1]])
    assert table is not None
    assert dict(table) == {
        "client-ids": [0, 1, 2],
        "num-examples": [10, 11, 12],
        "correct": [0, 1, 2],
    }


@pytest.mark.parametrize(
    "reply_badly",
    [
        lambda m: Message(Error(2, "lost"), reply_to=m),
        lambda m: Message(RecordDict(), reply_to=m),
        lambda m: Message(RecordDict({"metrics": ConfigRecord()}), reply_to=m),
        lambda m: Message(RecordDict({"metrics": GOOD}), reply_to=m),
        lambda m: evaluation(m),
        lambda m: evaluation(m, num_examples=4),
        lambda m: evaluation(m, correct=4),
        lambda m: evaluation(m, a=4, b=2),
        lambda m: evaluation(m, num_examples=4, correct=5),
        lambda m: evaluation(m, num_examples=-4, correct=-5),
        lambda m: evaluation(m, num_examples=4, correct=float("nan")),
        lambda m: evaluation(m, num_examples=float("inf"), correct=2),
        lambda m: evaluation(m, num_examples=float("nan"), correct=float("nan")),
        lambda m: evaluation(m, num_examples=1e300, correct=1e300),
        lambda m: evaluation(m, num_examples=[4], correct=2),
        lambda m: forged(evaluation(m, num_examples=4, correct=2), source=NODE),
    ],
)
def test_a_bad_evaluation_is_left_out(
    reply_badly: Callable[[Message], Message], caplog: pytest.LogCaptureFixture
) -> None:
    strategy = strategy_of_clients(3)
    zero, one, two = asked_to_evaluate(strategy)
    good = [evaluation(m, num_examples=4, correct=2) for m in (zero, two)]
    table = strategy.aggregate_evaluate(1, [reply_badly(one), *good])
    assert table is not None
    assert dict(table) == {"client-ids": [0, 2], "num-examples": [4, 4], "correct": [2, 2]}
    assert "client 1: evaluation dropped" in caplog.text
    assert strategy.aggregate_evaluate(1, [Message(Error(2, "lost"), reply_to=zero)]) is None


def test_the_server_decides_which_metrics_there_are() -> None:
    strategy = strategy_of_clients(2)
    zero, one = asked_to_evaluate(strategy)
    # The names of client 0 come last in the alphabet, and one of them is a name of ours.
    liar = Message(
        RecordDict(
            {"metrics": MetricRecord({"zeal": 1, "client-ids": [7, 7], "num-examples": 1, "~": 2})}
        ),
        reply_to=zero,
    )
    table = strategy.aggregate_evaluate(1, [liar, evaluation(one, num_examples=4, correct=2)])
    assert table is not None
    assert dict(table) == {"client-ids": [1], "num-examples": [4], "correct": [2]}
    more = evaluation(zero, num_examples=8, correct=3, client_ids=9, other=float("nan"))
    table = strategy.aggregate_evaluate(1, [more, evaluation(one, num_examples=4, correct=2)])
    assert table is not None
    assert dict(table) == {"client-ids": [0, 1], "num-examples": [8, 4], "correct": [3, 2]}


def test_text_of_clients_is_short_and_printable_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    strategy = strategy_of_clients(2)
    evil = "\x1b[2J\x1b]0;title\x07\u202e\r\n" + "x" * 2_000_000
    zero, one = asked_to_evaluate(strategy)
    strategy.aggregate_evaluate(
        1, [Message(Error(2, evil), reply_to=zero), evaluation(one, **{evil: 1})]
    )
    zero, one = send(strategy, {"ctx": full(0.0)})
    shared_after(strategy, [Message(Error(2, evil), reply_to=zero), answer(one, {evil: full(1)})])
    for record in caplog.records:
        assert record.getMessage().isprintable()
        assert len(record.getMessage()) < 2 * LONGEST_REASON
    assert len(caplog.records) >= 4


# Divergence


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), 1e31])
def test_a_loss_that_is_not_finite_is_named_and_left_out(loss: float) -> None:
    strategy = strategy_of_clients(2)
    zero, one = send(strategy, {"ctx": full(0)})
    replies = [
        Message(content({"ctx": full(1)}, **{"num-examples": 1, "loss": 2.0}), reply_to=zero),
        Message(content({"ctx": full(3)}, **{"num-examples": 1, "loss": loss}), reply_to=one),
    ]
    exchanged = strategy.screen(1, [zero, one], replies)
    assert list(exchanged.diverged) == [1]
    assert "'loss'" in exchanged.diverged[1]
    assert exchanged.dropped == {}
    assert exchanged.accepted == 2


def test_tensors_that_are_not_finite_are_told_from_other_faults() -> None:
    strategy = strategy_of_clients(3)
    asked = send(strategy, {"ctx": full(0)})
    values = (full(1e9), full(float("nan")), full(1))
    replies = [answer(m, {"ctx": v}) for m, v in zip(asked, values, strict=True)]
    exchanged = strategy.screen(1, asked, replies)
    assert list(exchanged.dropped) == [0, 1]
    assert list(exchanged.diverged) == [1]


def test_a_diverged_evaluation_counts_and_is_named() -> None:
    strategy = strategy_of_clients(2)
    zero, one = asked_to_evaluate(strategy)
    replies = [
        evaluation(zero, num_examples=4, correct=2),
        evaluation(one, num_examples=4, correct=0, not_finite=4),
    ]
    rows = screen_evaluations(
        [zero, one],
        replies,
        strategy.known.client_of_node,
        count_ranges(TEST_COUNTS),
        strategy.evaluation_faults,
    )
    part = personal_scores(rows, TEST_COUNTS)
    assert part is not None
    assert part["not_finite"] == [1]
    assert part["accuracy"] == [0.5, 0.0]
