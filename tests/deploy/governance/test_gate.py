"""A hostile server against a node with a policy, a ledger and an audit log.

The tests play the server: they call `fedprompt.deploy.node.answer` with its messages.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedprompt.config.protection import PrivacyConfig, SecureAggregationConfig
from fedprompt.config.schema import Config, to_yaml
from fedprompt.deploy import node as node_module
from fedprompt.deploy.governance import audit, gate, ledger
from fedprompt.deploy.governance.journal import verify
from fedprompt.deploy.governance.ledger import (
    Budget,
    Ledger,
    Release,
    spent_epsilon,
    spent_image_epsilon,
)
from fedprompt.deploy.governance.policy import Policy, objections
from fedprompt.deploy.node import answer
from fedprompt.deploy.node_grid import pull_replies
from fedprompt.deploy.node_report import read_report
from fedprompt.errors import UserError
from fedprompt.experiment.compose import compose
from fedprompt.experiment.workspaces import open_workspace
from fedprompt.federation.server_app import Federation
from fedprompt.messages import (
    ARRAYS,
    METRICS,
    SITE,
    become_server,
    client_of,
    from_wire,
    to_arrays,
    to_record,
    to_wire,
)
from fedprompt.methods.registry import method_class
from fedprompt.privacy.accountant import epsilon
from fedprompt.privacy.secure_aggregation import RECORD
from fedprompt.simulation.inline_grid import InlineGrid
from fedprompt.workspace import Workspace
from tests.support.federations import CLASSES, config_for, write_clients

NOISE = PrivacyConfig(noise=4.0, clip=0.5)
PLENTY = Budget(100.0, 1e-5)
MASKED = SecureAggregationConfig(enabled=True, max_weight=100, clip=1000.0)


class Node:
    """A node as a server sees it, and its folder of records."""

    def __init__(self, folder: Path, policy: str = "", **sections: Any) -> None:
        self.images, self.records = folder / "images", folder / "records"
        self.config: Config = replace(config_for(self.images, folder / "run"), **sections)
        self.settings: dict[str, Any] = {
            "partition-id": 1,
            "data": str(self.images / "client-1"),
            "device": "cpu",
            "state-dir": str(folder / "state"),
            "records": str(self.records),
            "server": "fed.example.org:9092",
        }
        if policy:
            path = folder / f"policy-{hashlib.sha256(policy.encode()).hexdigest()[:8]}.yaml"
            path.write_text(policy)
            self.settings["policy"] = str(path)

    def ask(self, kind: str, server_round: int = 1, run: str = "r", shift: float = 0.0) -> Message:
        become_server()
        content = RecordDict({"config": ConfigRecord({"server-round": server_round})})
        shared = open_workspace(self.config).method.init_shared(self.config.seed)
        content[ARRAYS] = to_record({n: t.numpy() + shift for n, t in shared.items()})
        message = Message(content, dst_node_id=5, message_type=kind)
        message.metadata.__dict__["_message_id"] = "m"
        # A restart of the node forgets everything but its files.
        gate.open_gate.cache_clear()
        text = to_yaml(self.config).replace(str(self.images), "/not/here")
        return answer(message, self.settings, {"config": text, "run": run}, 7)

    def entries(self) -> list[dict[str, Any]]:
        return verify(self.records / audit.FILE, audit.WHAT)


def reason(reply: Message) -> str:
    if reply.has_error():
        return str(reply.error.reason)
    return str(reply.content["config"]["fault"])  # type: ignore[call-overload]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    write_clients(tmp_path / "images")
    yield tmp_path
    node_module._opened.cache_clear()


def test_without_a_policy_everything_is_answered_and_recorded(folder: Path) -> None:
    node = Node(folder)
    report = node.ask(MessageType.QUERY)
    trained = node.ask(MessageType.TRAIN)
    tested = node.ask(MessageType.EVALUATE)
    entries = node.entries()
    assert [(e["event"], e["kind"]) for e in entries] == [
        (event, kind) for kind in ("query", "train", "evaluate") for event in ("asked", "sent")
    ]
    for reply, sent in zip((report, trained, tested), entries[1::2], strict=True):
        assert reply.content[SITE] == ConfigRecord({"policy": "none", "audit": sent["hash"]})
    # Exactly what has left is described: names, sizes and hashes.
    arrays = to_arrays(trained.content[ARRAYS])  # type: ignore[arg-type]
    described = entries[3]["content"][ARRAYS]
    assert {n: tuple(d["shape"]) for n, d in described.items()} == {
        n: a.shape for n, a in arrays.items()
    }
    for name, values in arrays.items():
        assert described[name]["sha256"] == hashlib.sha256(values.tobytes()).hexdigest()
    assert set(entries[5]["content"][METRICS]) == set(tested.content[METRICS])
    assert entries[2]["server"] == "fed.example.org:9092"


@pytest.mark.parametrize(
    ("policy", "kind"),
    [
        ("methods: [promptfl]", MessageType.QUERY),
        ("max_rounds: 2", MessageType.TRAIN),
        ("classes: [river, beach]", MessageType.TRAIN),
        ("min_noise: 1", MessageType.EVALUATE),
        ("secure_aggregation: true", MessageType.TRAIN),
        ("tensors: [nothing]", MessageType.TRAIN),
        ("max_numbers: 7", MessageType.TRAIN),
        ("max_change: 1.0e-9", MessageType.TRAIN),
        ("test_accuracy: false", MessageType.EVALUATE),
        ("max_epsilon: 3", MessageType.TRAIN),
    ],
)
def test_a_node_does_not_do_what_its_policy_forbids(folder: Path, policy: str, kind: str) -> None:
    node = Node(folder, policy)
    reply = node.ask(kind)
    assert policy.partition(":")[0] in reason(reply)
    last = node.entries()[-1]
    assert last["event"] == audit.REFUSED
    assert policy.partition(":")[0] in last["reason"]
    assert last["policy"] != gate.NO_POLICY


def test_what_is_forbidden_is_not_even_opened(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Node(folder, "experiments: [other]")
    monkeypatch.setattr(node_module, "open_workspace", lambda _: pytest.fail("opened"))
    node_module._opened.cache_clear()
    assert "experiments" in reason(node.ask(MessageType.QUERY))


def test_counts_are_revealed_as_the_policy_says(folder: Path) -> None:
    exact = read_report(Node(folder).ask(MessageType.QUERY).content, len(CLASSES), 3)
    rounded = Node(folder, "class_counts: rounded\ntest_accuracy: false").ask(MessageType.QUERY)
    withheld = Node(folder, "class_counts: withheld\ntest_accuracy: false").ask(MessageType.QUERY)
    report = read_report(rounded.content, len(CLASSES), 3)
    assert all(a % 10 == 0 and a >= b for a, b in zip(report.train_C, exact.train_C, strict=True))
    report = read_report(withheld.content, len(CLASSES), 3)
    assert (report.train_C, report.num_train) == ((), exact.num_train)
    assert report.labelled
    assert report.warnings(CLASSES) == exact.warnings(CLASSES)


def test_no_server_makes_a_node_spend_more_than_its_ledger_allows(folder: Path) -> None:
    one, two = (epsilon(NOISE.noise / 2, n, 1e-5) for n in (1, 2))
    assert one is not None
    assert two is not None
    policy = f"max_epsilon: {(two + 0.01):.6f}"
    node = Node(folder, policy, privacy=NOISE)
    assert not node.ask(MessageType.TRAIN, 1, "r").has_error()
    # Another run, or the same round with other prompts, is another release.
    assert not node.ask(MessageType.TRAIN, 1, "another").has_error()
    for server_round, run, shift in [(1, "third", 0.0), (2, "r", 0.0), (1, "r", 0.1)]:
        reply = node.ask(MessageType.TRAIN, server_round, run, shift)
        assert "max_epsilon" in reason(reply)
    spent = spent_epsilon(node.records, 1e-5)
    assert spent == {str((folder / "images" / "client-1").resolve()): (2, two)}


def test_the_same_question_gets_the_same_bytes_and_is_counted_once(folder: Path) -> None:
    node = Node(folder, "max_epsilon: 100", privacy=NOISE)
    first = node.ask(MessageType.TRAIN)
    again = node.ask(MessageType.TRAIN)
    other = node.ask(MessageType.TRAIN, shift=0.1)
    assert first.content[ARRAYS] == again.content[ARRAYS]
    assert first.content[ARRAYS] != other.content[ARRAYS]
    ((releases, _),) = spent_epsilon(node.records, 1e-5).values()
    assert releases == 2


@pytest.mark.parametrize("step", ["write_bytes", "append"])
def test_a_kill_before_the_ledger_is_written_spends_nothing_and_after_it_not_twice(
    folder: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    node = Node(folder, "max_epsilon: 100", privacy=NOISE)

    class Killed(BaseException):
        pass

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        if step == "write_bytes":
            patch.setattr(ledger, "write_bytes", die)
        else:
            patch.setattr(ledger.Journal, "append", die)
            patch.setattr(audit.AuditLog, "asked", lambda *_, **__: "")
        with pytest.raises(Killed):
            node.ask(MessageType.TRAIN)
    assert spent_epsilon(node.records, 1e-5) == {}
    assert not node.ask(MessageType.TRAIN).has_error()
    with monkeypatch.context() as patch:
        # After the release is counted, but before the reply has left.
        patch.setattr(audit.AuditLog, "sent", die)
        with pytest.raises(Killed):
            node.ask(MessageType.TRAIN, 2)
    assert not node.ask(MessageType.TRAIN, 2).has_error()
    ((releases, _),) = spent_epsilon(node.records, 1e-5).values()
    assert releases == 2


def test_a_changed_log_stops_the_node(folder: Path) -> None:
    node = Node(folder, "max_epsilon: 100", privacy=NOISE)
    assert not node.ask(MessageType.TRAIN).has_error()
    path = node.records / ledger.FILE
    path.write_bytes(path.read_bytes().replace(b'"noise":2.0', b'"noise":9.0'))
    assert "privacy ledger" in reason(node.ask(MessageType.TRAIN, 2))
    path = node.records / audit.FILE
    path.write_bytes(b"")
    reply = node.ask(MessageType.TRAIN, 2)
    assert "audit log" in reason(reply)
    assert str(folder) not in reason(reply), "the server must not learn the node's paths"


def test_a_limit_on_epsilon_needs_a_ledger(folder: Path) -> None:
    node = Node(folder, "max_epsilon: 100", privacy=NOISE)
    del node.settings["records"]
    assert "records" in reason(node.ask(MessageType.TRAIN))


def test_epsilon_of_several_noises_is_composed(tmp_path: Path) -> None:
    book = Ledger(tmp_path, "data")
    for k, noise in enumerate((2.0, 2.0, 8.0)):
        book.spend(f"{k}", b"reply", Release(noise / 2), f"{k}", PLENTY)
    assert dict(book.releases()) == {1.0: 2, 4.0: 1}
    two = epsilon(1.0, 2, 1e-5)
    assert two is not None
    assert two < book.epsilon(1e-5) < two + 3
    assert Ledger(tmp_path, "other data").epsilon(1e-5) == 0


def test_single_images_have_a_limit_and_a_count_of_their_own(folder: Path) -> None:
    config = config_for(folder / "images", folder / "run")
    epochs = config.training.local_epochs
    one = epsilon(2.0, epochs, 1e-5)
    assert one is not None
    node = Node(
        folder,
        f"max_image_epsilon: {one + 0.01:.6f}",
        privacy=PrivacyConfig(image_noise=2.0),
        method=method_class("promptfl").Config(context_tokens=2),
    )
    assert not node.ask(MessageType.TRAIN).has_error()
    assert not node.ask(MessageType.TRAIN).has_error(), "the same question"
    refused = reason(node.ask(MessageType.TRAIN, 2))
    assert "max_image_epsilon" in refused
    assert "single images" in refused
    ((count, spent),) = spent_image_epsilon(node.records, 1e-5).values()
    assert (count, spent) == (epochs, one)
    assert spent_epsilon(node.records, 1e-5) == {}, "all of the data are another matter"


def test_kinds_of_sampling_compose_in_the_ledger(tmp_path: Path) -> None:
    book = Ledger(tmp_path, "data")
    budget = Budget(None, 1e-5, 100.0)
    sampled, whole = Release(0.0, ((1.5, 10), 30)), Release(1.0, ((2.0, 1), 3))
    for k, release in enumerate((sampled, whole, sampled)):
        book.spend(f"{k}", b"reply", release, f"{k}", budget)
    assert dict(book.image_releases()) == {(1.5, 10): 60, (2.0, 1): 3}
    assert dict(book.releases()) == {1.0: 1}
    alone = epsilon(2.0, 3, 1e-5)
    assert alone is not None
    assert alone < book.image_epsilon(1e-5) < alone + 5


def test_the_egress_statement_says_what_has_left(folder: Path) -> None:
    node = Node(folder)
    for kind in (MessageType.QUERY, MessageType.TRAIN, MessageType.TRAIN, MessageType.EVALUATE):
        node.ask(kind)
    page = audit.egress_statement(node.entries(), "r")
    (name,) = to_arrays(node.ask(MessageType.TRAIN).content[ARRAYS])  # type: ignore[arg-type]
    assert f"| {name} |" in page
    assert "2 requests, of which the site answered 2" in page
    assert "fedrsclip" in page
    assert "fed.example.org" in page
    with pytest.raises(UserError, match=r"'other'.*: r\."):
        audit.egress_statement(node.entries(), "other")


def test_the_server_takes_the_record_of_a_node_out_of_its_replies() -> None:
    class Fake(Grid):
        def __init__(self, replies: dict[str, Message]) -> None:
            self.replies = replies

        def pull_messages(self, message_ids: Any) -> Any:
            return [self.replies[i] for i in message_ids]

    Fake.__abstractmethods__ = frozenset()
    become_server()
    asked, replies = {}, {}
    for node, site in enumerate(
        ({"policy": "a" * 64, "audit": "b" * 64}, {"policy": "x\n" * 500}, None)
    ):
        message = Message(RecordDict(), dst_node_id=node, message_type=MessageType.TRAIN)
        message.metadata.__dict__["_message_id"] = str(node)
        content = RecordDict({ARRAYS: to_record({"s": np.zeros(2, np.float32)})})
        if site is not None:
            content[SITE] = ConfigRecord(site)  # type: ignore[arg-type]
        reply = Message(content, reply_to=message)
        reply.metadata.__dict__["_src_node_id"] = node
        asked[str(node)], replies[str(node)] = message, reply
    sites: dict[int, dict[str, str]] = {}
    pulled = pull_replies(Fake(replies), asked, sites)
    assert all(set(reply.content) == {ARRAYS} for reply in pulled.values())
    assert sites[0] == {"policy": "a" * 64, "audit": "b" * 64}
    assert len(sites[1]["policy"]) <= 64
    assert sites[1]["policy"].isprintable()
    assert 2 not in sites


class MaskedNodes(InlineGrid):
    """A grid whose messages nodes with policies answer; what they say of these is taken out."""

    def __init__(self, workspace: Workspace, nodes: list[Node]) -> None:
        super().__init__(workspace)
        self.nodes = nodes
        self.states: dict[int, RecordDict] = {}

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        replies = []
        for number, message in enumerate(messages):
            message.metadata.__dict__["_message_id"] = f"m{number}"
            client = client_of(message.metadata.dst_node_id)
            node = self.nodes[client]
            state = self.states.setdefault(client, RecordDict())
            text = to_yaml(node.config).replace(str(node.images), "/not/here")
            asked = from_wire(to_wire(message))
            reply = answer(asked, node.settings, {"config": text, "run": "r"}, 7, state)
            if not reply.has_error():
                del reply.content[SITE]
            replies.append(from_wire(to_wire(reply)))
        return replies


def test_under_secure_aggregation_a_repeated_round_is_counted_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A node has one workspace; here three nodes share a process.
    monkeypatch.setattr(node_module, "_opened", lru_cache(3)(node_module._opened.__wrapped__))
    policy = "secure_aggregation: true\nmin_peers: 2\nmax_epsilon: 100\nmax_change: 1000"
    nodes = []
    for client in range(3):
        path = folder / f"site-{client}"
        path.mkdir()
        (path / "images").symlink_to(folder / "images")
        node = Node(path, policy, privacy=NOISE, secure_aggregation=MASKED)
        node.settings |= {
            "partition-id": client,
            "data": str(folder / "images" / f"client-{client}"),
        }
        nodes.append(node)
    workspace = open_workspace(nodes[0].config)
    grid = MaskedNodes(workspace, nodes)
    ends = []
    for _ in range(2):  # the server is killed after the round, and repeats it with new keys
        federation = Federation(workspace, grid)
        federation.join()
        line = federation.train_round(1)
        assert line["clients"]["accepted"] == 3, line
        ends.append({n: t.numpy().tobytes() for n, t in federation.shared.items()})
    assert ends[0] == ends[1], "the noise of a repeated round is that of the first"
    for node in nodes:
        ((releases, _),) = spent_epsilon(node.records, 1e-5).values()
        assert releases == 1
        sent = [e["content"] for e in node.entries() if e["event"] == audit.SENT]
        assert len(sent) == 10, "five stages, twice"
        assert all(set(content) == {RECORD} for content in sent)


def test_a_reply_that_the_policy_refuses_is_counted_and_tells_no_norm(folder: Path) -> None:
    node = Node(folder, "max_epsilon: 3\nmax_change: 1.0e-6", privacy=NOISE)
    reasons = {reason(node.ask(MessageType.TRAIN, 1, f"run{k}")) for k in range(4)}
    assert any("max_change" in r for r in reasons)
    assert any("max_epsilon" in r for r in reasons), "the budget ends although nothing has left"
    assert not any("norm" in r and "above 1e-06" not in r for r in reasons)
    ((_, spent),) = spent_epsilon(node.records, 1e-5).values()
    assert 0 < spent <= 3


def test_two_processes_do_not_spend_more_than_one_may(tmp_path: Path) -> None:
    one = epsilon(NOISE.noise / 2, 1, 1e-5)
    assert one is not None
    budget = Budget(one + 0.01, 1e-5)
    first, second = Ledger(tmp_path, "data"), Ledger(tmp_path, "data")
    for book in (first, second):
        book.check(Release(NOISE.noise / 2), budget)
    first.spend("a", b"reply", Release(NOISE.noise / 2), "r", budget)
    with pytest.raises(UserError, match="max_epsilon"):
        second.spend("b", b"reply", Release(NOISE.noise / 2), "s", budget)
    # A reply that was kept and not counted is not free either.
    files = [p for p in tmp_path.iterdir() if p.suffix == ".bin"]
    assert len(files) == 1
    assert second.releases().total() == 1


def test_rounds_that_an_experiment_does_not_have_are_refused(folder: Path) -> None:
    node = Node(folder)
    for server_round in (4, 10**9, -7, 2**62):
        assert "max_rounds" in reason(node.ask(MessageType.TRAIN, server_round))
    assert not list((folder / "state").rglob("*.safetensors"))


def test_a_message_that_fails_is_recorded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = Node(folder)

    def broken(*_: Any, **__: Any) -> None:
        raise OverflowError("/srv/secret is too large")

    monkeypatch.setattr(node_module, "_answer", broken)
    with pytest.raises(OverflowError):
        node.ask(MessageType.TRAIN)
    last = node.entries()[-1]
    assert (last["event"], last["reason"]) == (audit.REFUSED, "OverflowError")


def test_a_method_that_sends_sums_over_classes_needs_exact_counts(folder: Path) -> None:
    config = compose("quickstart", ["method=afl"])
    policy = Policy(class_counts="withheld", test_accuracy=False)
    assert any("afl" in found for found in objections(policy, config))
    assert objections(Policy(), config) == []
