"""The server's side of the four stages, on any Flower grid.

A client that is missing or answers nonsense at one stage is left out from there on; what it has
already put into the others' masks is removed with the shares of its key. The round is void where
too few are left, and then nobody's update is known.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from flwr.app import ConfigRecord, Message, MessageType, RecordDict

from fedprompt.config.schema import SecureAggregationConfig
from fedprompt.messages import error_reason, sanitised
from fedprompt.privacy.secure_aggregation import COLLECT, RECORD, SETUP, SHARE_KEYS, STAGE, UNMASK
from fedprompt.privacy.secure_aggregation.flower import (
    Key,
    bytes_to_public_key,
    combine_shares,
    pairwise_secret,
)
from fedprompt.privacy.secure_aggregation.masks import Masked, mask
from fedprompt.privacy.secure_aggregation.params import FEWEST_CLIENTS, Terms
from fedprompt.privacy.secure_aggregation.vector import Numbers

log = logging.getLogger("fedprompt.server")

Exchange = Callable[[Sequence[Message]], Iterable[Message]]
Read = TypeVar("Read")
LONGEST_KEY, LONGEST_SHARE = 1024, 4096
"""Bytes of a public key and of a share, sealed or not; Flower's take about 215 and 700 at most."""


class _Void(Exception):
    """The round cannot be completed."""


class _Nonsense(Exception):
    """A reply that is not what its stage asks for."""


@dataclass
class Outcome:
    """What came of a round: the sum of the vectors of the nodes in `counted`, or why there is none.

    `dropped` has the reason why a node's update is not in the sum. `silent` nodes are in the sum,
    but did not help to unmask it.
    """

    total: Numbers | None = None
    counted: list[int] = field(default_factory=list)
    dropped: dict[int, str] = field(default_factory=dict)
    silent: dict[int, str] = field(default_factory=dict)
    void: str = ""


def secure_sum(
    messages: Sequence[Message],
    exchange: Exchange,
    settings: SecureAggregationConfig,
    *,
    numbers: int,
    enough: int = 1,
) -> Outcome:
    """The sum of all clients' vectors, of which none is seen.

    Args:
        messages: the round's train messages, one per node, as they would be sent without this.
        exchange: sends messages and returns the replies that came in time; called four times.
        settings: the section of the config.
        numbers: length of a client's vector.
        enough: fewest clients in the sum.
    """
    outcome = Outcome()
    if len(messages) < FEWEST_CLIENTS:
        outcome.void = f"{len(messages)} clients, fewer than {FEWEST_CLIENTS}"
        return outcome
    try:
        _Round(messages, exchange, settings, numbers, enough, outcome).run()
    except _Void as reason:
        outcome.total, outcome.void = None, str(reason)
    return outcome


class _Round:
    """One round; nodes are Flower's node ids, and a stage's survivors keep the order of ids."""

    def __init__(
        self,
        messages: Sequence[Message],
        exchange: Exchange,
        settings: SecureAggregationConfig,
        numbers: int,
        enough: int,
        outcome: Outcome,
    ) -> None:
        self.messages = {m.metadata.dst_node_id: m for m in messages}
        self.exchange, self.outcome = exchange, outcome
        self.terms = Terms.of(settings, len(messages))
        self.count = numbers + 1  # Flower puts its own weight in front
        self.enough = max(enough, self.terms.threshold)
        self.peers = _circle(sorted(self.messages), self.terms.shares)
        self.keys: dict[int, tuple[bytes, bytes]] = {}

    def run(self) -> None:
        """All four stages; raises `_Void`."""
        self.keys = self._survivors(self._setup(), SETUP)
        sealed = self._survivors(self._share_keys(), SHARE_KEYS)
        vectors = self._survivors(self._collect(sealed), COLLECT)
        self.outcome.counted = sorted(vectors)
        shares = self._unmask(set(sealed), set(vectors))
        total = np.zeros(self.count, dtype=np.uint32)
        for vector in vectors.values():
            total = total + vector
        for owner in sorted(sealed):
            total = self._without_masks_of(owner, total, set(vectors), shares.get(owner, []))
        self.outcome.total = self._read_sum(total, len(vectors))

    # Stages

    def _setup(self) -> dict[int, tuple[bytes, bytes]]:
        def read(node: int, record: ConfigRecord) -> tuple[bytes, bytes]:
            keys = record.get(Key.PUBLIC_KEY_1), record.get(Key.PUBLIC_KEY_2)
            first, second = (_bytes(k, LONGEST_KEY) for k in keys)
            for key in (first, second):
                bytes_to_public_key(key)  # peers could not go on with a broken one
            return first, second

        return self._ask(SETUP, {n: dict(self.terms.setup()) for n in self.messages}, read)

    def _share_keys(self) -> dict[int, dict[int, bytes]]:
        """Sealed shares by the node that has made them and the one they are for."""
        here = set(self.keys)

        def read(node: int, record: ConfigRecord) -> dict[int, bytes]:
            nodes, sealed = _list(record, Key.DESTINATION_LIST), _list(record, Key.CIPHERTEXT_LIST)
            if sorted(nodes) != sorted((self.peers[node] & here) - {node}):
                raise _Nonsense("shares for other clients than its peers")
            pairs = zip(nodes, sealed, strict=True)
            return {peer: _bytes(part, LONGEST_SHARE) for peer, part in pairs}

        asked = {
            node: {str(peer): list(self.keys[peer]) for peer in sorted(self.peers[node] & here)}
            for node in self.keys
        }
        return self._ask(SHARE_KEYS, asked, read)

    def _collect(self, sealed: Mapping[int, Mapping[int, bytes]]) -> dict[int, Masked]:
        def read(node: int, record: ConfigRecord) -> Masked:
            content = _bytes(record.get(Key.MASKED_PARAMETERS), 4 * self.count)
            if len(content) != 4 * self.count:
                raise _Nonsense(f"{len(content)} bytes instead of {4 * self.count}")
            return np.frombuffer(content, dtype="<u4").astype(np.uint32)

        asked: dict[int, dict[str, Any]] = {}
        for node in sealed:
            sources = sorted((self.peers[node] & set(sealed)) - {node})
            asked[node] = {
                Key.CIPHERTEXT_LIST: [sealed[source][node] for source in sources],
                Key.SOURCE_LIST: sources,
            }
        return self._ask(COLLECT, asked, read)

    def _unmask(self, shared: set[int], here: set[int]) -> dict[int, list[bytes]]:
        """Shares by owner: of the seeds of those who are here, of the keys of those who are not."""
        asked: dict[int, dict[str, Any]] = {
            node: {
                Key.ACTIVE_NODE_ID_LIST: sorted(self.peers[node] & here),
                Key.DEAD_NODE_ID_LIST: sorted(self.peers[node] & (shared - here)),
            }
            for node in sorted(here)
        }

        def read(node: int, record: ConfigRecord) -> dict[int, bytes]:
            owners, shares = _list(record, Key.NODE_ID_LIST), _list(record, Key.SHARE_LIST)
            if sorted(owners) != sorted(self.peers[node] & shared):
                raise _Nonsense("shares of other clients than its peers")
            pairs = zip(owners, shares, strict=True)
            return {owner: _bytes(share, LONGEST_SHARE) for owner, share in pairs}

        by_owner: dict[int, list[bytes]] = {}
        for given in self._ask(UNMASK, asked, read, lost=self.outcome.silent).values():
            for owner, share in given.items():
                by_owner.setdefault(owner, []).append(share)
        return by_owner

    # The sum

    def _without_masks_of(
        self, owner: int, total: Masked, here: set[int], shares: list[bytes]
    ) -> Masked:
        """The sum less the masks that hang on one client's secret."""
        if len(shares) < self.terms.threshold:
            raise _Void(
                f"{len(shares)} shares of a client's secret came, and {self.terms.threshold} are "
                "needed to remove its masks"
            )
        try:
            secret = combine_shares(shares[: self.terms.threshold])
            if owner in here:
                return total - mask(secret, self.count)
            for peer in sorted((self.peers[owner] & here) - {owner}):
                common = mask(pairwise_secret(secret, self.keys[peer][0]), self.count)
                # The peer has added it where its own id is the larger one.
                total = total - common if peer > owner else total + common
        except ValueError as error:
            raise _Void(f"a client's shares do not fit together ({error})") from None
        return total

    def _read_sum(self, total: Masked, clients: int) -> Numbers:
        """The vectors' sum; a mask that was left over would show."""
        levels = self.terms.levels
        most = clients * levels
        if int(total[0]) != most or int(total.max()) > most:
            raise _Void("the masks do not cancel; a client has sent something wrong")
        return (2.0 * total[1:].astype(np.float64) - most) / levels

    # Messages

    def _ask(
        self,
        stage: str,
        asked: Mapping[int, Mapping[str, Any]],
        read: Callable[[int, ConfigRecord], Read],
        lost: dict[int, str] | None = None,
    ) -> dict[int, Read]:
        """What the nodes answer, by node id in ascending order; `lost` gets the others' reasons."""
        lost = self.outcome.dropped if lost is None else lost
        messages = [self._message(stage, node, asked[node]) for node in sorted(asked)]
        answers: dict[int, Read] = {}
        seen: set[int] = set()
        for reply in self.exchange(messages):
            node = reply.metadata.src_node_id
            if node not in asked:
                log.warning("secure aggregation, %s: %s", stage, sanitised(error_reason(reply)))
                continue
            if node in seen:
                answers.pop(node, None)
                lost[node] = f"replied twice ({stage})"
                continue
            seen.add(node)
            try:
                answers[node] = read(node, _record(reply))
            except Exception as error:  # every byte is a peer's
                lost[node] = sanitised(f"{' '.join(str(error).split())} ({stage})")
        for node in asked:
            if node not in seen:
                lost[node] = f"no reply ({stage})"
        return dict(sorted(answers.items()))

    def _message(self, stage: str, node: int, values: Mapping[str, Any]) -> Message:
        template = self.messages[node]
        record = ConfigRecord({**values, STAGE: stage})
        # Tensors and settings go out with the one stage in which clients train.
        common = template.content if stage == COLLECT else RecordDict()
        return Message(
            content=RecordDict({**common, RECORD: record}),
            dst_node_id=node,
            message_type=MessageType.TRAIN,
            group_id=template.metadata.group_id,
        )

    def _survivors(self, answers: dict[int, Read], stage: str) -> dict[int, Read]:
        """Those who have enough peers left among themselves; raises `_Void` where few are."""
        here = set(answers)
        while alone := {n for n in here if len(self.peers[n] & here) < self.terms.threshold}:
            here -= alone
            for node in alone:
                self.outcome.dropped[node] = f"fewer than {self.terms.threshold} peers left"
        if len(here) < self.enough:
            raise _Void(f"{len(here)} clients left after '{stage}', fewer than {self.enough}")
        return {n: a for n, a in answers.items() if n in here}


def _circle(nodes: list[int], shares: int) -> dict[int, set[int]]:
    """Every node's peers, itself included: its neighbours on a circle in secret random order."""
    if shares == len(nodes):
        return {node: set(nodes) for node in nodes}
    secrets.SystemRandom().shuffle(nodes)
    half, total = shares // 2, len(nodes)
    return {
        node: {nodes[(place + step) % total] for step in range(-half, half + 1)}
        for place, node in enumerate(nodes)
    }


def _record(reply: Message) -> ConfigRecord:
    if reply.has_error():
        raise _Nonsense(error_reason(reply))
    record = reply.content.get(RECORD)
    if set(reply.content) != {RECORD} or not isinstance(record, ConfigRecord):
        raise _Nonsense(f"records {sorted(reply.content)} instead of ['{RECORD}']")
    return record


def _bytes(value: Any, longest: int) -> bytes:
    if not isinstance(value, bytes) or len(value) > longest:
        raise _Nonsense(f"no bytes, or more than {longest}")
    return value


def _list(record: ConfigRecord, name: str) -> list[Any]:
    value = record.get(name)
    if not isinstance(value, list):
        raise _Nonsense(f"no list '{name}'")
    return value
