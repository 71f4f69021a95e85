"""The client's side of secure aggregation: Flower's mod, behind checks that Flower leaves out.

Between the stages of a round, a client keeps keys, seed and shares in `state`, as Flower's mod does
in `Context.state`. A request that is refused or fails ends the round for this client: the state is
cleared, so that a second request about the same masks is never answered.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict

from fedprompt.config.protection import SecureAggregationConfig
from fedprompt.config.schema import Config
from fedprompt.errors import UserError
from fedprompt.messages import ARRAYS, CONFIG, METRICS, Arrays, to_arrays
from fedprompt.privacy.secure_aggregation import (
    ALIKE,
    COLLECT,
    CONFIRM,
    RECORD,
    SETUP,
    SHARE_KEYS,
    STAGE,
    UNMASK,
    flower,
    stage_of,
)
from fedprompt.privacy.secure_aggregation.masks import Masked, stream
from fedprompt.privacy.secure_aggregation.params import FEWEST_CLIENTS, Terms
from fedprompt.privacy.secure_aggregation.survivors import (
    SumLog,
    check_confirmed,
    confirm,
    ids,
    remember_start,
    start_of,
)
from fedprompt.privacy.secure_aggregation.vector import Numbers, encode

log = logging.getLogger("fedprompt.client")


def answer(
    config: Config,
    message: Message,
    state: RecordDict,
    train: Callable[[], Message],
    *,
    clients: int,
    log_of_sums: SumLog | None = None,
) -> Message:
    """The reply to a training message of an experiment with secure aggregation.

    Args:
        config: the experiment.
        message: one stage of the protocol.
        state: what this client keeps from stage to stage; changed in place, empty after a round.
        train: trains and returns the reply that a plain exchange would send; it is called in one of
            the stages only.
        clients: number of clients that the experiment asks in a round (`Workspace.round_size`).
        log_of_sums: remembers the sums that this client has helped to unmask; None in a simulation.

    Returns:
        The reply to send; it contains only what the stage requires.

    Raises:
        UserError: the request is refused, or the client cannot answer it.
    """
    stage = stage_of(message)
    try:
        if stage is None:
            raise UserError("the server asks for an update in the clear.")
        if stage == SETUP:
            state.clear()
        secrets = None if stage == SETUP else _round_state(state)
        record = message.content.config_records[RECORD]
        if secrets is None:
            _check_terms(config.secure_aggregation, clients, record)
        elif stage == SHARE_KEYS:
            _check_peers(record, secrets)
        elif stage == COLLECT:
            _check_sources(record, secrets)
            remember_start(message.content, state)
        elif stage == UNMASK:
            check_confirmed(record, secrets, state, log_of_sums)
        if secrets is not None and stage == CONFIRM:
            confirmed = confirm(record, secrets, state, log_of_sums)
            reply = Message(RecordDict({RECORD: confirmed}), reply_to=message)
        else:
            reply = _answer(config, message, stage, state, train)
    except Exception as error:
        state.clear()
        log.debug("secure aggregation: %s", stage, exc_info=True)
        reason = " ".join(str(error).split())
        if not isinstance(error, UserError):
            reason = f"{type(error).__name__}: {reason}"
        raise UserError(f"secure aggregation: {reason}") from None
    # After unmasking, the secrets of the round have served their purpose.
    if stage == UNMASK or reply.has_error():
        state.clear()
    return reply


def _answer(
    config: Config, message: Message, stage: str, state: RecordDict, train: Callable[[], Message]
) -> Message:
    """The reply of Flower's mod to a request that has been checked, with our masks added."""
    record = message.content.config_records[RECORD]
    trained: Message | None = None
    if stage == COLLECT:
        # The most expensive step comes after all checks of the request.
        trained = train()
        if trained.has_error():
            return trained
    request = copy.copy(message)
    # Flower's mod removes entries from the record that it is given.
    request.content = RecordDict({RECORD: ConfigRecord({**record})})
    vector = None
    if trained is not None:
        vector = _vector(config, message, trained, _round_state(state))

    def trained_parameters(inner: Message, context: Context) -> Message:
        """Answers Flower's mod when it asks for the client's trained parameters."""
        assert vector is not None
        success = flower.Status(flower.Code.OK, "")
        parameters = flower.ndarrays_to_parameters([vector])
        result = flower.FitRes(success, parameters, num_examples=1, metrics={})
        return Message(flower.fitres_to_recorddict(result, False), reply_to=inner)

    out = flower.secaggplus_mod(request, Context(0, 0, {}, state, {}), trained_parameters)
    reply = out.content.config_records[RECORD]
    if vector is not None:
        # The mod's reply also has the number of images and the metrics, which must not leave here.
        sources = ids(record, flower.Key.SOURCE_LIST)
        masked = _add_own_masks(reply, _round_state(state), sources, start_of(message.content))
        reply = ConfigRecord({flower.Key.MASKED_PARAMETERS: masked.astype("<u4").tobytes()})
    return Message(RecordDict({RECORD: reply}), reply_to=message)


def _vector(
    config: Config, message: Message, reply: Message, state: flower.SecAggPlusState
) -> Numbers:
    """What this client adds to the sum, computed from the reply that a plain exchange would send.

    Raises:
        UserError: the client has more images than a masked weight can express.
    """
    settings = config.secure_aggregation
    metrics, requested = reply.content[METRICS], message.content.get(CONFIG)
    assert isinstance(metrics, MetricRecord)
    images = metrics["num-examples"]
    assert isinstance(images, int)
    alike = isinstance(requested, ConfigRecord) and bool(requested.get(ALIKE))
    # Replies with noise do not reveal the number of images, so their weights are equal.
    alike = alike or bool(config.privacy.noise)
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
        levels=state.target_range,
    )
    if cut:
        # A warning comes from the server, which knows for how many clients this happened.
        log.info("the change was cut off at secure_aggregation.clip=%g", settings.clip)
    return vector


def _add_own_masks(
    reply: ConfigRecord, state: flower.SecAggPlusState, sources: list[int], start: str
) -> Masked:
    """Add our masks to the numbers that Flower's mod has masked, see masks.py.

    Args:
        reply: what Flower's mod would send.
        state: this client's secrets of the round.
        sources: node ids of the peers whose masks cancel this client's.
        start: digest of the tensors that the client was sent.

    Returns:
        The numbers to send, modulo 2^32.
    """
    arrays: Any = reply[flower.Key.MASKED_PARAMETERS]
    parts = [flower.bytes_to_ndarray(part).ravel() for part in arrays]
    masked: Masked = np.concatenate(parts).astype(np.uint32)
    masked = masked + stream(state.rd_seed, masked.size, start)
    for peer in sources:
        secret = flower.pairwise_secret(state.sk1, state.public_keys_dict[peer][0])
        shared_mask = stream(secret, masked.size, start)
        # Opposite signs on the two sides let the mask cancel in the sum.
        masked = masked + shared_mask if state.nid > peer else masked - shared_mask
    return masked


def _check_terms(
    settings: SecureAggregationConfig, clients: int, record: Mapping[str, Any]
) -> None:
    """Refuse parameters that differ from the experiment's, the number of clients included.

    A server that names fewer clients than the experiment has would lower the threshold with it.
    """
    if clients < FEWEST_CLIENTS:
        raise UserError(f"a round has {clients} clients; {FEWEST_CLIENTS} are needed.")
    expected = {STAGE: SETUP, **Terms.of(settings, clients).setup()}
    if dict(record) != expected:
        wrong = sorted(k for k in {*record, *expected} if record.get(k) != expected.get(k))
        raise UserError(f"the server's terms are not the experiment's: {', '.join(wrong)}.")


def _check_peers(record: Mapping[str, Any], state: flower.SecAggPlusState) -> None:
    """Refuse more peers than shares; Flower's mod checks the rest."""
    peers = len(record) - 1
    if peers > state.share_num:
        raise UserError(f"the server names {peers} peers for {state.share_num} shares.")


def _check_sources(record: Mapping[str, Any], state: flower.SecAggPlusState) -> None:
    """Refuse encrypted shares unless they come from peers with known keys, once from each."""
    sources = ids(record, flower.Key.SOURCE_LIST)
    peers = set(state.public_keys_dict) - {state.nid}
    if len(set(sources)) != len(sources) or not set(sources) <= peers:
        raise UserError("the server forwards shares that are no peer's, or a peer's twice.")


def _round_state(state: RecordDict) -> flower.SecAggPlusState:
    """This client's secrets of the present round.

    Raises:
        UserError: no round is under way.
    """
    if flower.RECORD_KEY_STATE not in state.config_records:
        raise UserError("this client knows of no round that is under way; it may have restarted.")
    return flower.SecAggPlusState(**state.config_records[flower.RECORD_KEY_STATE])


def _arrays(message: Message) -> Arrays:
    record = message.content[ARRAYS]
    assert isinstance(record, ArrayRecord)
    return to_arrays(record)
