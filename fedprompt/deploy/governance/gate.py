"""Applies a node's policy, privacy ledger and audit log to every message. Runs on the node.

`fedprompt.deploy.node` passes each message through one `Gate`: `admit` before anything is opened,
`train` around local training, and `release` as the last step before a reply leaves.
"""

from __future__ import annotations

import datetime
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType

from fedprompt.config.schema import Config, to_yaml
from fedprompt.deploy.governance.audit import AuditLog
from fedprompt.deploy.governance.ledger import Budget, Ledger, Release
from fedprompt.deploy.governance.policy import (
    Policy,
    class_objections,
    closed_until,
    objections,
    read_policy,
    reply_objections,
    revealed_counts,
)
from fedprompt.deploy.node_report import NodeReport
from fedprompt.errors import UserError
from fedprompt.messages import ARRAYS, CONFIG, SITE, from_wire, to_arrays, to_wire
from fedprompt.privacy.secure_aggregation import RECORD
from fedprompt.runtime.peer_text import sanitised

NO_POLICY = "none"
"""What stands in place of a policy's hash where a node has none."""


class Gate:
    """What stands between a server's messages and this node's data.

    Args:
        policy: the node's policy.
        policy_hash: its SHA-256, or `NO_POLICY`.
        records: folder of audit log and ledger; None keeps neither.
        data: names the data whose privacy is spent.
        server: the server's address, for the audit log.
    """

    def __init__(
        self, policy: Policy, policy_hash: str, records: Path | None, data: str, server: str
    ) -> None:
        self.policy = policy
        self.policy_hash = policy_hash
        self.audit = None if records is None else AuditLog(records)
        self.ledger = None if records is None else Ledger(records, data)
        self._server = server

    def asked(self, message: Message, run: str, run_id: int) -> None:
        """Record a request, before it is looked at any further."""
        if self.audit is not None:
            # The name comes from the server, and could be megabytes long.
            self.audit.asked(message, run=sanitised(run), run_id=run_id, server=self._server)

    def admit(self, message: Message, config: Config) -> None:
        """Refuse a request that the policy does not allow.

        Raises:
            UserError: the message names every key of the policy that it violates.
        """
        policy = self.policy
        found = objections(policy, config)
        if (opens := closed_until(policy, datetime.datetime.now().time())) is not None:
            found.append(f"hours: this node answers from {opens} on ({policy.hours})")
        if (asked := _round(message)) is not None and not 0 <= asked <= config.federation.rounds:
            found.append(f"max_rounds: the experiment has no round {asked}")
        kind = message.metadata.message_type
        if kind == MessageType.EVALUATE and not policy.test_accuracy:
            found.append("test_accuracy: this node answers no evaluations")
        _refuse(found)

    def check_classes(self, class_names: Sequence[str]) -> None:
        """Refuse the classes of a data set that the policy does not allow.

        Raises:
            UserError: there are such classes.
        """
        _refuse(class_objections(self.policy, class_names))

    def revealed(self, report: NodeReport) -> NodeReport:
        """The report as the policy reveals it."""
        train_C = tuple(revealed_counts(self.policy, report.train_C))
        test_C = tuple(revealed_counts(self.policy, report.test_C))
        withheld = not train_C
        totals = (report.num_train, report.num_test) if withheld else None
        return replace(report, train_C=train_C, test_C=test_C, totals=totals)

    def train(
        self,
        message: Message,
        config: Config,
        run: str,
        work: Callable[[], Message],
        release: Release,
    ) -> Message:
        """Train, unless the policy or the ledger is against it.

        Args:
            message: the server's training message.
            config: the experiment.
            run: the run's name.
            work: trains, and returns the reply of a plain exchange.
            release: what this reply will let out.

        Returns:
            This reply. With a limit on epsilon, a question that comes again gets the same reply.

        Raises:
            UserError: the release would exceed the limit, or violates the policy.
        """
        policy = self.policy
        if not policy.limits_epsilon:
            reply = work()
            self._check_reply(message, reply)
            return reply
        assert self.ledger is not None  # `open_gate` refuses a limit without records
        budget = Budget(policy.max_epsilon, policy.delta, policy.max_image_epsilon)
        question = _question(message, config, run)
        kept = self.ledger.kept_reply(question)
        if kept is None:
            self.ledger.check(release, budget)
            reply = work()
            if reply.has_error():
                return reply
            kept = to_wire(reply)
        # Counted before it is compared with the policy: that it is refused says something as well.
        self.ledger.spend(question, kept, release, run, budget)
        reply = Message(from_wire(kept).content, reply_to=message)
        self._check_reply(message, reply)
        return reply

    def _check_reply(self, message: Message, reply: Message) -> None:
        """Refuse a trained reply that violates the policy."""
        if reply.has_error():
            return
        records = reply.content.get(ARRAYS), message.content.get(ARRAYS)
        sent, received = (to_arrays(r) if isinstance(r, ArrayRecord) else {} for r in records)
        squares = [
            np.square(values.astype(np.float64) - received.get(name, 0.0)).sum()
            for name, values in sent.items()
        ]
        _refuse(reply_objections(self.policy, sent, math.sqrt(sum(squares))))

    def release(self, message: Message, reply: Message, run: str, config: Config | None) -> Message:
        """Record a reply and add what identifies policy and audit log; the last step of a reply.

        Args:
            message: the server's message.
            reply: the reply to it.
            run: the run's name.
            config: the experiment; None if it could not be read.
        """
        if self.audit is None:
            return reply
        names = {} if config is None else {
            "experiment": sanitised(config.experiment), "method": config.method.name,
        }  # fmt: skip
        entry = self.audit.sent(
            message,
            reply,
            run=sanitised(run),
            server=self._server,
            policy=self.policy_hash,
            **names,
        )
        if not reply.has_error():
            reply.content[SITE] = ConfigRecord({"policy": self.policy_hash, "audit": entry})
        return reply


@lru_cache(maxsize=8)
def open_gate(policy: str | None, records: str | None, data: str, server: str) -> Gate:
    """The gate of a node; a process reads its policy once, so that a change needs a restart.

    Args:
        policy: the policy file; None allows everything.
        records: folder of audit log and ledger; None keeps neither.
        data: names the data whose privacy is spent.
        server: the server's address, for the audit log.

    Raises:
        UserError: the policy is wrong, or limits epsilon where no ledger is kept.
    """
    read, digest = (Policy(), NO_POLICY) if policy is None else read_policy(Path(policy))
    if read.limits_epsilon and records is None:
        raise UserError(
            "policy: max_epsilon and max_image_epsilon need a ledger; set 'records' in "
            "--node-config."
        )
    return Gate(read, digest, None if records is None else Path(records), data, server)


def _round(message: Message) -> int | None:
    """The round that a message is for; None if it names none, and -1 if it is no number."""
    settings = message.content.get(CONFIG)
    if not isinstance(settings, ConfigRecord) or "server-round" not in settings:
        return None
    value = settings["server-round"]
    return value if isinstance(value, int) and not isinstance(value, bool) else -1


def _refuse(found: Sequence[str]) -> None:
    if found:
        raise UserError(f"this node's policy is against it ({'; '.join(found)}).")


def _question(message: Message, config: Config, run: str) -> str:
    """What identifies a training message: the run, the experiment and everything in the message."""
    digest = hashlib.sha256(to_yaml(config).encode())
    digest.update(run.encode())
    for name, record in sorted(message.content.items()):
        if isinstance(record, ArrayRecord):
            for key, values in sorted(to_arrays(record).items()):
                digest.update(f"{name}.{key}".encode() + values.tobytes())
        elif name != RECORD:  # its keys are new whenever a round is repeated
            digest.update(f"{name}.{sorted(record.items())}".encode())
    return digest.hexdigest()
