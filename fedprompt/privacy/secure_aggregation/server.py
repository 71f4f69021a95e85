"""The server's side of the five stages, on any Flower grid.

A client that does not reply at one stage, or whose reply is malformed, is excluded from the later
stages. Its contribution to the masks of others is removed with the shares of its key. If too few
clients are left, the round is void, and no update is revealed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from flwr.app import ConfigRecord, Message, MessageType, RecordDict

from fedprompt.config.protection import SecureAggregationConfig
from fedprompt.messages import Refused, read_answers
from fedprompt.privacy.secure_aggregation import (
    COLLECT,
    CONFIRM,
    RECORD,
    SETUP,
    SHARE_KEYS,
    STAGE,
    UNMASK,
    flower,
)
from fedprompt.privacy.secure_aggregation.masks import Masked, mask
from fedprompt.privacy.secure_aggregation.params import FEWEST_CLIENTS, Terms, draw_peers
from fedprompt.privacy.secure_aggregation.replies import bytes_of, list_of, record_of
from fedprompt.privacy.secure_aggregation.survivors import (
    PEERS,
    SURVIVORS,
    TAG_BYTES,
    TAGS,
    start_of,
)
from fedprompt.privacy.secure_aggregation.vector import Numbers
from fedprompt.runtime.peer_text import sanitised

log = logging.getLogger("fedprompt.server")

Ask = Callable[[Sequence[Message]], Iterable[Message]]
"""Sends the messages of one stage and returns the replies that came in time."""
Read = TypeVar("Read")
LONGEST_KEY, LONGEST_SHARE = 1024, 4096
"""Largest number of bytes of a public key and of a share; Flower's take about 215 and 700."""


class _Void(Exception):
    """The round cannot be completed; the message gives the reason."""


@dataclass
class Outcome:
    """Result of a round.

    Attributes:
        total: sum of the vectors of the nodes in `counted`, or None if the round is void.
        counted: ids of the nodes whose vectors are in the sum, ascending.
        trained: ids of the nodes that have trained, ascending, whether or not there is a sum.
        dropped: why a node's vector is not in the sum, by node id.
        silent: why a node did not help to unmask the sum, by node id; its vector is in it.
        void: why there is no sum; "" if there is one.
        levels: number of steps in [-1, 1] that the clients' numbers are rounded to.
    """

    total: Numbers | None = None
    counted: list[int] = field(default_factory=list)
    trained: list[int] = field(default_factory=list)
    dropped: dict[int, str] = field(default_factory=dict)
    silent: dict[int, str] = field(default_factory=dict)
    void: str = ""
    levels: int = 0


def secure_sum(
    messages: Sequence[Message],
    ask: Ask,
    settings: SecureAggregationConfig,
    *,
    numbers: int,
    clients: int,
    min_clients: int = 1,
) -> Outcome:
    """The sum of all clients' vectors, without any single one being revealed.

    Args:
        messages: the round's training messages, one per node, as a plain exchange would send them.
        ask: sends the messages of one stage; called at most five times.
        settings: the section `secure_aggregation` of the config.
        numbers: length of a client's vector.
        clients: number of clients that train in a round in which all can be reached.
        min_clients: smallest number of clients in the sum.

    Returns:
        The sum and who is in it. A round that cannot be completed is void, never an error.
    """
    outcome = Outcome()
    if len(messages) < FEWEST_CLIENTS:
        outcome.void = f"{len(messages)} clients, fewer than {FEWEST_CLIENTS}"
        return outcome
    try:
        terms = Terms.of(settings, clients)
        _Round(messages, ask, terms, numbers, min_clients, outcome).run()
    except _Void as reason:
        outcome.total, outcome.void = None, str(reason)
    return outcome


class _Round:
    """One round. Nodes are Flower's node ids; the survivors of every stage are sorted by id.

    The arguments are those of `secure_sum`, with the terms of the round; `outcome` is filled in as
    the round proceeds.
    """

    def __init__(
        self,
        messages: Sequence[Message],
        ask: Ask,
        terms: Terms,
        numbers: int,
        min_clients: int,
        outcome: Outcome,
    ) -> None:
        self.messages = {m.metadata.dst_node_id: m for m in messages}
        self.ask, self.outcome = ask, outcome
        # All clients are sent the same tensors.
        self.start = start_of(messages[0].content)
        self.terms = terms
        outcome.levels = terms.levels
        self.count = numbers + 1  # Flower puts a weight of its own in front
        # With fewer clients than the threshold, no secret could be recovered.
        self.min_clients = max(min_clients, self.terms.threshold)
        self.peers = draw_peers(sorted(self.messages), self.terms.shares)
        self.keys: dict[int, tuple[bytes, bytes]] = {}

    def run(self) -> None:
        """All five stages and the sum; raises `_Void`."""
        self.keys = self._survivors(self._setup(), SETUP)
        sealed = self._survivors(self._share_keys(), SHARE_KEYS)
        vectors = self._survivors(self._collect(sealed), COLLECT)
        self.outcome.counted = sorted(vectors)
        tags = self._confirm(set(vectors))
        shares = self._unmask(set(sealed), set(vectors), tags)
        # uint32 wraps around at 2^32, which is the modulus of the masks.
        total = np.zeros(self.count, dtype=np.uint32)
        for vector in vectors.values():
            total = total + vector
        # Every client that distributed shares may have left masks in the vectors of its peers.
        for owner in sorted(sealed):
            total = self._without_masks_of(owner, total, set(vectors), shares.get(owner, []))
        self.outcome.total = self._read_sum(total, len(vectors))

    # Stages

    def _setup(self) -> dict[int, tuple[bytes, bytes]]:
        """Both public keys of every node."""

        def read(node: int, record: ConfigRecord) -> tuple[bytes, bytes]:
            keys = record.get(flower.Key.PUBLIC_KEY_1), record.get(flower.Key.PUBLIC_KEY_2)
            first, second = (bytes_of(k, LONGEST_KEY) for k in keys)
            for key in (first, second):
                flower.bytes_to_public_key(key)  # a broken key would make all peers fail
            return first, second

        return self._ask(SETUP, {n: dict(self.terms.setup()) for n in self.messages}, read)

    def _share_keys(self) -> dict[int, dict[int, bytes]]:
        """Encrypted shares, by the node that made them and the node they are for."""
        present = set(self.keys)

        def read(node: int, record: ConfigRecord) -> dict[int, bytes]:
            nodes = list_of(record, flower.Key.DESTINATION_LIST)
            sealed = list_of(record, flower.Key.CIPHERTEXT_LIST)
            if sorted(nodes) != sorted((self.peers[node] & present) - {node}):
                raise Refused("shares for other clients than its peers")
            pairs = zip(nodes, sealed, strict=True)
            return {peer: bytes_of(part, LONGEST_SHARE) for peer, part in pairs}

        asked = {
            node: {str(peer): list(self.keys[peer]) for peer in sorted(self.peers[node] & present)}
            for node in self.keys
        }
        return self._ask(SHARE_KEYS, asked, read)

    def _collect(self, sealed: Mapping[int, Mapping[int, bytes]]) -> dict[int, Masked]:
        """The masked vector of every node; this is the stage in which clients train."""

        def read(node: int, record: ConfigRecord) -> Masked:
            content = bytes_of(record.get(flower.Key.MASKED_PARAMETERS), 4 * self.count)
            if len(content) != 4 * self.count:
                raise Refused(f"{len(content)} bytes instead of {4 * self.count}")
            return np.frombuffer(content, dtype="<u4").astype(np.uint32)

        asked: dict[int, dict[str, Any]] = {}
        for node in sealed:
            sources = sorted((self.peers[node] & set(sealed)) - {node})
            asked[node] = {
                flower.Key.CIPHERTEXT_LIST: [sealed[source][node] for source in sources],
                flower.Key.SOURCE_LIST: sources,
            }
        return self._ask(COLLECT, asked, read)

    def _confirm(self, present: set[int]) -> dict[int, dict[int, bytes]]:
        """Tags of the list of survivors, by the node that they are for and the one that made them.

        Raises:
            _Void: too few peers of a node have confirmed the list for it to give its shares.
        """

        def read(node: int, record: ConfigRecord) -> dict[int, bytes]:
            peers, tags = list_of(record, PEERS), list_of(record, TAGS)
            if sorted(peers) != sorted((self.peers[node] & present) - {node}):
                raise Refused("tags for other clients than its peers")
            pairs = zip(peers, tags, strict=True)
            return {peer: bytes_of(tag, TAG_BYTES) for peer, tag in pairs}

        asked = {node: {SURVIVORS: sorted(present)} for node in present}
        made = self._ask(CONFIRM, asked, read, lost=self.outcome.silent)
        for node in present:
            agreed = len(self.peers[node] & set(made))
            if agreed < self.terms.threshold:
                raise _Void(
                    f"{agreed} of a client's peers confirmed who is in the sum, and "
                    f"{self.terms.threshold} are needed"
                )
        return {
            node: {peer: made[peer][node] for peer in made if node in made[peer]} for node in made
        }

    def _unmask(
        self, shared: set[int], present: set[int], tags: Mapping[int, Mapping[int, bytes]]
    ) -> dict[int, list[bytes]]:
        """Shares by owner: of the seeds of present nodes, of the keys of those that left."""
        asked: dict[int, dict[str, Any]] = {
            node: {
                PEERS: list(tags[node]),
                TAGS: list(tags[node].values()),
                flower.Key.ACTIVE_NODE_ID_LIST: sorted(self.peers[node] & present),
                flower.Key.DEAD_NODE_ID_LIST: sorted(self.peers[node] & (shared - present)),
            }
            for node in sorted(tags)
        }

        def read(node: int, record: ConfigRecord) -> dict[int, bytes]:
            owners = list_of(record, flower.Key.NODE_ID_LIST)
            shares = list_of(record, flower.Key.SHARE_LIST)
            if sorted(owners) != sorted(self.peers[node] & shared):
                raise Refused("shares of other clients than its peers")
            pairs = zip(owners, shares, strict=True)
            return {owner: bytes_of(share, LONGEST_SHARE) for owner, share in pairs}

        by_owner: dict[int, list[bytes]] = {}
        # A node that is silent here has sent its vector already, so it is not dropped.
        for given in self._ask(UNMASK, asked, read, lost=self.outcome.silent).values():
            for owner, share in given.items():
                by_owner.setdefault(owner, []).append(share)
        return by_owner

    # The sum

    def _without_masks_of(
        self, owner: int, total: Masked, present: set[int], shares: list[bytes]
    ) -> Masked:
        """Remove the masks that depend on one client's secret from the sum.

        Args:
            owner: node id of the client.
            total: the sum so far.
            present: nodes whose vectors are in the sum.
            shares: shares of the owner's seed if it is present, of its key if not.

        Raises:
            _Void: there are too few shares, or they do not fit together.
        """
        if len(shares) < self.terms.threshold:
            raise _Void(
                f"{len(shares)} shares of a client's secret came, and {self.terms.threshold} are "
                "needed to remove its masks"
            )
        try:
            secret = flower.combine_shares(shares[: self.terms.threshold])
            if owner in present:
                return total - mask(secret, self.count, self.start)
            for peer in sorted((self.peers[owner] & present) - {owner}):
                common = flower.pairwise_secret(secret, self.keys[peer][0])
                masked = mask(common, self.count, self.start)
                # The peer has added the mask if its own id is the larger one.
                total = total - masked if peer > owner else total + masked
        except Exception as error:  # a client may have shared anything, which raises any error
            reason = sanitised(f"{type(error).__name__}: {error}")
            raise _Void(f"a client's shares do not fit together ({reason})") from None
        return total

    def _read_sum(self, total: Masked, clients: int) -> Numbers:
        """The sum of the vectors as numbers; raises `_Void` if a mask is left in it."""
        levels = self.terms.levels
        largest = clients * levels
        # The first number is the sum of Flower's weights, which are all 1.
        if int(total[0]) != largest or int(total.max()) > largest:
            raise _Void("the masks do not cancel; a client has sent something wrong")
        return (2.0 * total[1:].astype(np.float64) - largest) / levels

    # Messages

    def _ask(
        self,
        stage: str,
        asked: Mapping[int, Mapping[str, Any]],
        read: Callable[[int, ConfigRecord], Read],
        lost: dict[int, str] | None = None,
    ) -> dict[int, Read]:
        """What the nodes answer, by node id in ascending order.

        Args:
            stage: the stage's name.
            asked: what each node is told, by node id.
            read: checks a node's answer and returns what is used of it.
            lost: takes the reasons why nodes gave no usable answer; `outcome.dropped` by default.
        """
        lost = self.outcome.dropped if lost is None else lost
        messages = [self._message(stage, node, asked[node]) for node in sorted(asked)]

        def read_record(node: int, content: RecordDict) -> Read:
            return read(node, record_of(content))

        answers = read_answers(messages, self.ask(messages), read_record)
        lost.update({node: f"{fault} ({stage})" for node, fault in answers.faults.items()})
        if stage == COLLECT:
            self.outcome.trained = sorted(set(asked) - answers.absent)
        return answers.usable

    def _message(self, stage: str, node: int, values: Mapping[str, Any]) -> Message:
        template = self.messages[node]
        record = ConfigRecord({**values, STAGE: stage})
        # Tensors and settings are sent only in the stage in which clients train.
        common = template.content if stage == COLLECT else RecordDict()
        return Message(
            content=RecordDict({**common, RECORD: record}),
            dst_node_id=node,
            message_type=MessageType.TRAIN,
            group_id=template.metadata.group_id,
        )

    def _survivors(self, answers: dict[int, Read], stage: str) -> dict[int, Read]:
        """The answers of nodes with enough remaining peers; raises `_Void` if they are too few."""
        present, threshold = set(answers), self.terms.threshold
        # A node that is left out may be missing as a peer of another.
        while alone := {n for n in present if len(self.peers[n] & present) < threshold}:
            present -= alone
            for node in alone:
                self.outcome.dropped[node] = f"fewer than {threshold} peers left"
        if len(present) < self.min_clients:
            raise _Void(f"{len(present)} clients left after '{stage}', fewer than "
                        f"{self.min_clients}")  # fmt: skip
        return {node: answer for node, answer in answers.items() if node in present}
