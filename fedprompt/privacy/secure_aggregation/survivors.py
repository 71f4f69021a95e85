"""Before a sum is unmasked, its clients agree on whose numbers are in it. Runs on the clients.

Without this step, a server that tells clients different lists of survivors can unmask the sum of
fewer clients than the threshold, or of a single one. It is the consistency check of Bonawitz et al.
(CCS 2017), between the stages `collect` and `unmask`:

    confirm       the server names all survivors; every client sends each of its peers, through the
                  server, a tag of what it has seen: this list, the tensors that it started from,
                  and the settings of the round
    unmask        the server forwards the tags; a client gives its shares only if `threshold` of its
                  peers, itself included, have seen the same

A tag is an HMAC with the key that two peers share to encrypt their shares, so the server can make
none. Two lists cannot both have the tags of more than two thirds of a client's peers, unless more
than one third of them collude with the server.

The same step protects a round that is repeated. Local training is repeatable, so two sums of
updates from the same tensors differ by exactly the updates of the clients that are in one of them
only; in the next round, which begins at the same tensors if this one was lost, nearly so. A client
therefore helps to sum updates from the same tensors for one set of clients only, and a `SumLog`
remembers it. As more than two thirds of the clients have to help, no other set is ever summed. The
same set may be summed again, because that reveals the same.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedprompt.errors import UserError
from fedprompt.messages import ARRAYS, CONFIG, EXTRAS
from fedprompt.privacy.secure_aggregation import flower
from fedprompt.privacy.secure_aggregation.params import FEWEST_CLIENTS

SURVIVORS, PEERS, TAGS = "survivors", "peers", "tags"
"""Entries of the records: all node ids in the sum; the nodes that tags are for or from; the tags.
"""
VIEW, START, SETTINGS = "fedprompt_view", "start", "settings"
"""The record in a client's state of the round, and its entries beside `SURVIVORS`."""
TAG_BYTES = 32


class SumLog(Protocol):
    """What a client remembers of the sums that it has helped to unmask, beyond a restart."""

    def get(self, start: str) -> str | None:
        """The survivors of the sum of updates from these tensors, or None if there was none."""

    def put(self, start: str, survivors: str) -> None:
        """Remember a sum; it returns only when this is on the disk."""


def start_of(content: RecordDict) -> str:
    """The digest, in hexadecimal, of the tensors that a training message tells to start from."""
    hashed = hashlib.sha256()
    for record_name in (ARRAYS, EXTRAS):
        record = content.get(record_name)
        for name, array in sorted(record.items()) if isinstance(record, ArrayRecord) else ():
            head = (record_name, name, array.dtype, tuple(array.shape), len(array.data))
            hashed.update(repr(head).encode() + array.data)
    return hashed.hexdigest()


def remember_start(content: RecordDict, state: RecordDict) -> None:
    """Keep in a client's state what it was sent to train from; called in the stage `collect`."""
    settings = content.get(CONFIG)
    text = repr(sorted(settings.items())) if isinstance(settings, ConfigRecord) else ""
    state[VIEW] = ConfigRecord({START: start_of(content), SETTINGS: text})


def confirm(
    record: Mapping[str, Any],
    secrets: flower.SecAggPlusState,
    state: RecordDict,
    log: SumLog | None,
) -> ConfigRecord:
    """A client's answer in the stage `confirm`.

    Args:
        record: the server's request.
        secrets: the client's secrets of the round.
        state: the client's state of the round, which then contains the list of survivors.
        log: the sums that the client has helped to unmask; None if it keeps no record.

    Returns:
        A tag for each of the client's peers that survives.

    Raises:
        UserError: the list cannot be right, the client has confirmed another one in this round, or
            it has helped to sum the updates of other clients from the same tensors.
    """
    view = state.config_records.get(VIEW)
    if view is None or SURVIVORS in view:
        raise UserError("the server asks to confirm a list out of turn.")
    survivors = ids(record, SURVIVORS)
    known = set(secrets.rd_seed_share_dict)
    present = known & set(survivors)
    strangers = set(survivors) - known
    if (
        survivors != sorted(set(survivors))
        or secrets.nid not in present
        or len(present) < secrets.threshold
        or not FEWEST_CLIENTS <= len(survivors) <= secrets.sample_num
        # If all clients are peers of one another, there is nobody else.
        or (strangers and secrets.share_num >= secrets.sample_num)
    ):
        raise UserError("the server's list of survivors cannot be right.")
    before = log.get(str(view[START])) if log is not None else None
    if before not in (None, _digest_of_nodes(survivors)):
        raise UserError(
            "this client has helped to sum the updates of other clients from the same prompts, "
            "and the difference of two sums would reveal single updates. The round can be "
            "repeated when the same clients take part; otherwise start a new run."
        )
    state[VIEW] = ConfigRecord({**view, SURVIVORS: survivors})
    seen = _seen(state)
    peers = sorted(present - {secrets.nid})
    tags = [_tag(secrets.ss2_dict[p], secrets.nid, p, seen) for p in peers]
    return ConfigRecord({PEERS: peers, TAGS: tags})


def check_confirmed(
    record: Mapping[str, Any],
    secrets: flower.SecAggPlusState,
    state: RecordDict,
    log: SumLog | None,
) -> None:
    """Refuse to unmask unless enough peers have confirmed what this client has confirmed.

    From shares of both the seed and the key of one peer, its update could be unmasked, so the lists
    of the request must be those that follow from the list of survivors.

    Args:
        record: the server's request in the stage `unmask`.
        secrets: the client's secrets of the round.
        state: the client's state of the round.
        log: remembers the sum before this client reveals anything; None if no record is kept.

    Raises:
        UserError: the request is refused.
    """
    view = state.config_records.get(VIEW)
    if view is None or SURVIVORS not in view:
        raise UserError("the server asks for shares before the survivors have been confirmed.")
    survivors, known = ids(view, SURVIVORS), set(secrets.rd_seed_share_dict)
    present = known & set(survivors)
    active = ids(record, flower.Key.ACTIVE_NODE_ID_LIST)
    dead = ids(record, flower.Key.DEAD_NODE_ID_LIST)
    if sorted(active) != sorted(present) or sorted(dead) != sorted(known - present):
        raise UserError(
            "the server's lists of who is here and who has left do not fit the survivors: a client "
            "in both could be unmasked. No share was given."
        )
    tags = record.get(TAGS)
    tags = tags if isinstance(tags, list) else []
    seen, agreed = _seen(state), {secrets.nid}
    for peer, tag in zip(ids(record, PEERS), tags, strict=False):
        if peer in present - {secrets.nid} and isinstance(tag, bytes):
            expected = _tag(secrets.ss2_dict[peer], peer, secrets.nid, seen)
            if hmac.compare_digest(tag, expected):
                agreed.add(peer)
    if len(agreed) < secrets.threshold:
        raise UserError(
            f"{len(agreed)} of this client's peers have confirmed the same survivors and prompts, "
            f"and {secrets.threshold} are needed. No share was given."
        )
    if log is not None:
        log.put(str(view[START]), _digest_of_nodes(survivors))


def ids(record: Mapping[str, Any], name: str) -> list[int]:
    """The node ids in an entry of a record; none if it is missing or not a list."""
    values = record.get(name)
    return [v for v in values if isinstance(v, int)] if isinstance(values, list) else []


def _seen(state: RecordDict) -> bytes:
    """The digest of what a client has seen of the round."""
    view = state.config_records[VIEW]
    parts = (view[START], view[SETTINGS], _digest_of_nodes(ids(view, SURVIVORS)))
    return hashlib.sha256(repr(parts).encode()).digest()


def _tag(key: bytes, sender: int, receiver: int, seen: bytes) -> bytes:
    """The tag of one client for another; the key is known to these two only."""
    # Both ids, so that the server cannot send a client its own tags back.
    about = f"fedprompt secure aggregation view {sender} {receiver} ".encode() + seen
    return hmac.digest(key, about, "sha256")


def _digest_of_nodes(nodes: Iterable[int]) -> str:
    return hashlib.sha256(repr(sorted(nodes)).encode()).hexdigest()
