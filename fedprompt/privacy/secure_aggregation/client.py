"""A client's side: Flower's mod answers, after checks that Flower leaves out.

Between stages a client keeps keys, seed and shares in `state`, as Flower's mod does in
`Context.state`. A question that is refused or fails ends the round for this client: the state is
forgotten, so that no second question is ever answered about the same masks.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict

from fedprompt.config.schema import Config, SecureAggregationConfig
from fedprompt.errors import UserError
from fedprompt.messages import ARRAYS, CONFIG, METRICS, to_arrays
from fedprompt.privacy.secure_aggregation import (
    ALIKE,
    COLLECT,
    RECORD,
    SETUP,
    SHARE_KEYS,
    STAGE,
    UNMASK,
    flower,
    stage_of,
)
from fedprompt.privacy.secure_aggregation.flower import Key, SecAggPlusState
from fedprompt.privacy.secure_aggregation.masks import Masked, stream
from fedprompt.privacy.secure_aggregation.params import FEWEST_CLIENTS, Terms
from fedprompt.privacy.secure_aggregation.vector import Numbers, encode

log = logging.getLogger("fedprompt.client")


def answer(
    config: Config, message: Message, state: RecordDict, train: Callable[[], Message]
) -> Message:
    """The reply to a train message of an experiment with secure aggregation.

    Args:
        config: the experiment.
        message: one stage of the protocol.
        state: what this client keeps from stage to stage; changed in place, emptied at the end.
        train: trains and gives the reply that would be sent in the clear; called in one stage.

    Raises:
        UserError: the question is refused, or the client cannot answer it.
    """
    stage = stage_of(message)
    try:
        if stage is None:
            raise UserError("the server asks for an update in the clear.")
        reply = _answer(config, message, stage, state, train)
    except Exception as error:
        state.clear()
        log.debug("secure aggregation: %s", stage, exc_info=True)
        known = isinstance(error, UserError)
        reason = " ".join(str(error).split())
        raise UserError(
            f"secure aggregation: {reason if known else f'{type(error).__name__}: {reason}'}"
        ) from None
    if stage == UNMASK or reply.has_error():
        state.clear()
    return reply


def _answer(
    config: Config, message: Message, stage: str, state: RecordDict, train: Callable[[], Message]
) -> Message:
    record = message.content.config_records[RECORD]
    trained: Message | None = None
    if stage == SETUP:
        state.clear()
        _check_terms(config.secure_aggregation, record)
    elif stage == SHARE_KEYS:
        _check_peers(record, _kept(state))
    elif stage == COLLECT:
        _check_sources(record, _kept(state))
        trained = train()
        if trained.has_error():
            return trained
    elif stage == UNMASK:
        _check_lists(record, _kept(state))
    asked = copy.copy(message)
    asked.content = RecordDict({RECORD: ConfigRecord({**record})})  # Flower's mod empties it
    vector = None if trained is None else _vector(config, message, trained, _kept(state))

    def plain(inner: Message, context: Context) -> Message:
        """What Flower's mod takes for the client's trained parameters."""
        assert vector is not None
        done = flower.Status(flower.Code.OK, "")
        parameters = flower.ndarrays_to_parameters([vector])
        result = flower.FitRes(done, parameters, num_examples=1, metrics={})
        return Message(flower.fitres_to_recorddict(result, False), reply_to=inner)

    out = flower.secaggplus_mod(asked, Context(0, 0, {}, state, {}), plain)
    said = out.content.config_records[RECORD]
    if vector is not None:
        masked = _masked_twice(said, _kept(state), _ids(record, Key.SOURCE_LIST))
        said = ConfigRecord({Key.MASKED_PARAMETERS: masked.astype("<u4").tobytes()})
    return Message(RecordDict({RECORD: said}), reply_to=message)


def _vector(config: Config, message: Message, reply: Message, kept: SecAggPlusState) -> Numbers:
    """What this client adds to the sum, made of the reply that it would send in the clear."""
    settings = config.secure_aggregation
    metrics, asked = reply.content[METRICS], message.content.get(CONFIG)
    assert isinstance(metrics, MetricRecord)
    images = metrics["num-examples"]
    assert isinstance(images, int)
    alike = bool(config.privacy.noise) or (isinstance(asked, ConfigRecord) and asked.get(ALIKE))
    if not alike and images > settings.max_weight:
        raise UserError(
            "this client has more training images than secure_aggregation.max_weight="
            f"{settings.max_weight}; raise it."
        )
    loss = metrics.get("loss", 0.0)
    vector, cut = encode(
        _arrays(message),
        _arrays(reply),
        weight=1.0 if alike else images / settings.max_weight,
        loss=float(loss) if isinstance(loss, (int, float)) else math.nan,
        clip=settings.clip,
        levels=kept.target_range,
    )
    if cut:
        # The server warns, with the number of clients that this happened to.
        log.info("the change was cut off at secure_aggregation.clip=%g", settings.clip)
    return vector


def _masked_twice(said: ConfigRecord, kept: SecAggPlusState, sources: list[int]) -> Masked:
    """Flower's masked numbers with our own masks over them."""
    own: Any = said[Key.MASKED_PARAMETERS]
    parts = [flower.bytes_to_ndarray(part).ravel() for part in own]
    masked: Masked = np.concatenate(parts).astype(np.uint32)
    masked = masked + stream(kept.rd_seed, masked.size)
    for peer in sources:
        secret = flower.pairwise_secret(kept.sk1, kept.public_keys_dict[peer][0])
        ours = stream(secret, masked.size)
        masked = masked + ours if kept.nid > peer else masked - ours
    return masked


def _check_terms(settings: SecureAggregationConfig, record: Mapping[str, Any]) -> None:
    """The server's terms must be those of the experiment for the number of clients it names."""
    clients = record.get("sample_num")
    if not isinstance(clients, int) or clients < FEWEST_CLIENTS:
        raise UserError(f"the server names {clients!r} clients; {FEWEST_CLIENTS} are needed.")
    expected = {STAGE: SETUP, **Terms.of(settings, clients).setup()}
    if dict(record) != expected:
        wrong = sorted(k for k in {*record, *expected} if record.get(k) != expected.get(k))
        raise UserError(f"the server's terms are not the experiment's: {', '.join(wrong)}.")


def _check_peers(record: Mapping[str, Any], kept: SecAggPlusState) -> None:
    """There are no more peers than shares; Flower's mod checks the rest."""
    peers = len(record) - 1
    if peers > kept.share_num:
        raise UserError(f"the server names {peers} peers for {kept.share_num} shares.")


def _check_sources(record: Mapping[str, Any], kept: SecAggPlusState) -> None:
    """Sealed shares come from peers whose keys are known, once each."""
    sources = _ids(record, Key.SOURCE_LIST)
    peers = set(kept.public_keys_dict) - {kept.nid}
    if len(set(sources)) != len(sources) or not set(sources) <= peers:
        raise UserError("the server forwards shares that are no peer's, or a peer's twice.")


def _check_lists(record: Mapping[str, Any], kept: SecAggPlusState) -> None:
    """Every peer whose shares are held is either here or gone, and this client is here.

    With both shares of one peer, of its seed and of its key, its update could be unmasked. More
    than half of the shares are needed for each, so that the server cannot get both by telling one
    half of the clients this and the other half that.
    """
    active, dead = _ids(record, Key.ACTIVE_NODE_ID_LIST), _ids(record, Key.DEAD_NODE_ID_LIST)
    if sorted(active + dead) != sorted(kept.rd_seed_share_dict) or kept.nid not in active:
        raise UserError(
            "the server's lists of who is here and who has left do not fit: a client in both could "
            "be unmasked. No share was given."
        )


def _ids(record: Mapping[str, Any], name: str) -> list[int]:
    values = record.get(name)
    return [v for v in values if isinstance(v, int)] if isinstance(values, list) else []


def _kept(state: RecordDict) -> SecAggPlusState:
    """What this client has kept; raises `UserError` where it knows of no round."""
    if flower.RECORD_KEY_STATE not in state.config_records:
        raise UserError("this client knows of no round that is under way; it may have restarted.")
    return SecAggPlusState(**state.config_records[flower.RECORD_KEY_STATE])


def _arrays(message: Message) -> Any:
    record = message.content[ARRAYS]
    assert isinstance(record, ArrayRecord)
    return to_arrays(record)
