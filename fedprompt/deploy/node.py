"""Answers the server's messages for this node's client, from its images and private prompts.

Runs on a node, in its worker or, without a worker, in the process that Flower starts for the
message. Nothing leaves the node except the reply.
"""

from __future__ import annotations

import json
import logging
import shlex
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Error, Message, MessageType, RecordDict

from fedprompt.backbone.devices import order_sums
from fedprompt.config.schema import Config, to_dict, to_yaml
from fedprompt.deploy.governance.gate import Gate, open_gate
from fedprompt.deploy.governance.ledger import Release
from fedprompt.deploy.node_config import NodeSettings, on_node, read_node_settings, state_folder
from fedprompt.deploy.node_model import keep_model
from fedprompt.deploy.node_report import ZERO_SHOT, fault_reply, make_report, report_reply
from fedprompt.deploy.private_store import FileStore
from fedprompt.deploy.sum_log import FileSumLog
from fedprompt.deploy.versions import VERSIONS, check_server
from fedprompt.errors import UserError
from fedprompt.experiment.compose import compose, parse
from fedprompt.experiment.validate import validate
from fedprompt.experiment.workspaces import open_workspace
from fedprompt.federation.client_app import handle, server_round
from fedprompt.federation.received import received
from fedprompt.messages import CLIENT_FAILED, CONFIG
from fedprompt.methods.base import Tensors, takes_steps
from fedprompt.methods.registry import method_class
from fedprompt.privacy.secure_aggregation import require_flower
from fedprompt.privacy.secure_aggregation.client import answer as masked_answer
from fedprompt.runtime import use_threads
from fedprompt.runtime.peer_text import stderr_formatter
from fedprompt.workspace import Workspace

log = logging.getLogger("fedprompt.node")


def answer(
    message: Message,
    node_config: Mapping[str, Any],
    run_config: Mapping[str, Any],
    run_id: int,
    state: RecordDict | None = None,
) -> Message:
    """Answer one message of the server.

    Args:
        message: a query (which client is this?), a training or an evaluation message.
        node_config: the node's own settings, see node_config.py.
        run_config: the run's settings, from the server: the experiment's text and the run's name.
        run_id: Flower's id of the run.
        state: what secure aggregation keeps from one message to the next; changed in place.

    Returns:
        The reply. If the node cannot take part, it gives the reason in one line, which is also
        written to the node's log; paths of the node are removed from the server's copy.
    """
    _log_to_stderr()
    is_query = message.metadata.message_type == MessageType.QUERY
    node: NodeSettings | None = None
    gate: Gate | None = None
    config: Config | None = None
    run = str(run_config.get("run", ""))
    try:
        node = read_node_settings(node_config)
        gate = _gate(node)
        gate.asked(message, run, run_id)
        check_server(str(run_config.get(VERSIONS, "")))
        config = _parsed(experiment_text(run_config, node))
        # Before anything is opened: what the policy forbids must not even be looked at.
        gate.admit(message, config)
        workspace = _workspace(config, node)
        gate.check_classes(workspace.dataset.class_names)
        if is_query:
            reply = _report(workspace, node, message, gate)
        else:
            state = RecordDict() if state is None else state
            reply = _answer(workspace, node, message, run, run_id, state, gate)
        return gate.release(message, reply, run, config)
    except UserError as error:
        log.error("this node cannot take part: %s", error)
        reason = _without_paths(str(error), node)
        refusal = (
            fault_reply(reason, message)
            if is_query
            else Message(Error(CLIENT_FAILED, reason), reply_to=message)
        )
        return _refused(gate, message, refusal, run, config)
    except Exception as error:
        # The worker answers with the error's name; what the name says is recorded before it leaves.
        refusal = Message(Error(CLIENT_FAILED, type(error).__name__), reply_to=message)
        _refused(gate, message, refusal, run, config)
        raise


def _gate(node: NodeSettings) -> Gate:
    """What applies this node's policy, and keeps its audit log and ledger."""
    data = str(Path(node.data or node.root or "the data set").expanduser().resolve())
    return open_gate(node.policy, node.records, data, node.server)


def _refused(
    gate: Gate | None, message: Message, refusal: Message, run: str, config: Config | None
) -> Message:
    """The refusal, recorded if that is possible; it holds nothing but versions and a reason."""
    try:
        return refusal if gate is None else gate.release(message, refusal, run, config)
    except UserError as error:
        # The reason may be just this: a log that cannot be written.
        log.error("%s", error)
        return refusal


def _answer(
    workspace: Workspace,
    node: NodeSettings,
    message: Message,
    run: str,
    run_id: int,
    state: RecordDict,
    gate: Gate,
) -> Message:
    """The reply to a training or evaluation message."""

    def work() -> Message:
        return _work(workspace, node, message, run, run_id)

    if message.metadata.message_type != MessageType.TRAIN:
        return work()

    def train() -> Message:
        config = workspace.config
        images = len(workspace.partition.train(node.client))
        release = Release.of(config, images, steps=takes_steps(workspace.method))
        return gate.train(message, config, run, work, release)

    if not workspace.config.secure_aggregation.enabled:
        return train()
    require_flower()
    return masked_answer(
        workspace.config,
        message,
        state,
        train,
        clients=workspace.round_size,
        log_of_sums=FileSumLog(_client_folder(node, run, run_id)),
    )


def _report(workspace: Workspace, node: NodeSettings, message: Message, gate: Gate) -> Message:
    report = make_report(workspace, node.client)
    log.info(
        "client %d: %d training and %d test images",
        node.client,
        sum(report.train_C),
        sum(report.test_C),
    )
    for warning in report.warnings(workspace.dataset.class_names):
        log.warning("client %d: %s", node.client, warning)
    return report_reply(gate.revealed(report), message)


def _work(
    workspace: Workspace, node: NodeSettings, message: Message, run: str, run_id: int
) -> Message:
    """Train or evaluate with this client's private tensors, and store those that have changed."""
    settings = message.content.get(CONFIG)
    if isinstance(settings, ConfigRecord) and settings.get(ZERO_SHOT):
        zero_shot = workspace.with_method(method_class("zero_shot").Config())
        return handle(zero_shot, [node.client], [message], {})[0][0]
    folder = _client_folder(node, run, run_id)
    store = FileStore(folder)
    trains = message.metadata.message_type == MessageType.TRAIN
    # Training in round r starts from the tensors of round r - 1; an evaluation in round r uses
    # those that training in round r has stored.
    stored = store.latest(server_round(message) + (not trains))
    private: dict[int, Tensors] = {node.client: stored} if stored else {}
    replies, changed = handle(workspace, [node.client], [message], private)
    # Stored before the reply leaves, so that an update that counts is never without its private
    # part. If storing fails, the update is not sent either.
    for tensors in changed.values():
        store.put(server_round(message), tensors)
    shared = received(workspace, message)
    keep_model(folder, workspace, node.client, server_round(message), shared)
    return replies[0]


def _client_folder(node: NodeSettings, run: str, run_id: int) -> Path:
    """Where this node keeps what belongs to one run, from one message to the next."""
    return state_folder(node, run, run_id) / f"client-{node.client:05d}"


def experiment_text(run_config: Mapping[str, Any], node: NodeSettings) -> str:
    """The experiment as text, which is the only form in which a node takes it from a server.

    A plain `flwr run` names an experiment instead. That name may be any file, whose content shows
    in messages about it, so only a client on the server's machine that lends nothing follows it.

    Raises:
        UserError: the run names an experiment, or that experiment is wrong.
    """
    if text := str(run_config.get("config", "")):
        return text
    if node.data is not None or not node.same_machine:
        raise UserError(
            "this run does not contain its experiment as text, and this node opens no file that "
            "the server names; submit the run with 'fedprompt deploy run'."
        )
    return _composed(str(run_config.get("experiment", "")), str(run_config.get("overrides", "")))


@lru_cache(maxsize=1)
def _composed(experiment: str, overrides: str) -> str:
    return to_yaml(compose(experiment, shlex.split(overrides)))


def _workspace(experiment: Config, node: NodeSettings) -> Workspace:
    """This process's workspace, which is opened once per experiment and not per message.

    A process of Flower's simulation answers for many clients in turn. Their settings differ in the
    client's number alone, which the workspace does not depend on, so they all use the same one.
    """
    config = on_node(experiment, node)
    return _opened(json.dumps(to_dict(config), sort_keys=True))


@lru_cache(maxsize=1)
def _parsed(text: str) -> Config:
    return parse(text)


@lru_cache(maxsize=1)
def _opened(settings: str) -> Workspace:
    """The workspace of a config as JSON; a config itself cannot be the key of a cache."""
    config = validate(json.loads(settings))
    use_threads(config.simulation)
    order_sums(config.backbone)
    return open_workspace(config)


def _without_paths(text: str, node: NodeSettings | None) -> str:
    """A message for the server, in which a path of this node reads `<data>/beach/7.jpg`."""
    if node is not None:
        for name, folder in (
            ("data", node.data),
            ("root", node.root),
            ("state-dir", node.state_dir),
            ("cache-dir", node.cache_dir),
            ("checkpoint", node.checkpoint),
            ("policy", node.policy),
            ("records", node.records),
        ):
            if folder:
                text = text.replace(folder, f"<{name}>")
    return text


def _log_to_stderr() -> None:
    """Write our log lines to stderr, because Flower configures its own logger only."""
    logger = logging.getLogger("fedprompt")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(stderr_formatter("%(levelname)s fedprompt: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
