"""What a node does with a message: its one client, its own folder, its private prompts on disk."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from flwr.app import ConfigRecord, Error, Message, MessageType, RecordDict

from fedprompt.deploy.node_config import Node, on_node, read_node, state_folder
from fedprompt.deploy.node_report import ZERO_SHOT, describe, fault_reply, to_reply
from fedprompt.deploy.private_store import FileStore
from fedprompt.errors import UserError
from fedprompt.experiment.compose import compose, parse
from fedprompt.experiment.workspaces import open_workspace
from fedprompt.federation.client_app import handle, server_round
from fedprompt.messages import CLIENT_FAILED, CONFIG
from fedprompt.methods.base import Tensors
from fedprompt.methods.registry import method_class
from fedprompt.privacy.secure_aggregation import require_flower
from fedprompt.runtime import use_threads
from fedprompt.workspace import Workspace

log = logging.getLogger("fedprompt.node")


def answer(
    message: Message,
    node_config: Mapping[str, Any],
    run_config: Mapping[str, Any],
    run_id: int,
    state: RecordDict | None = None,
) -> Message:
    """The reply to one message; what the node's operator must mend is one line on both sides.

    `state` is what secure aggregation keeps from one message to the next, changed in place.
    """
    _log_here()
    asked = message.metadata.message_type == MessageType.QUERY
    node: Node | None = None
    try:
        node = read_node(node_config)
        workspace = _workspace(
            str(run_config.get("config", "")),
            str(run_config.get("experiment", "")),
            str(run_config.get("overrides", "")),
            node,
        )
        if asked:
            return _describe(workspace, node, message)
        run = str(run_config.get("run", ""))

        def work() -> Message:
            return _work(workspace, node, message, run, run_id)

        trains = message.metadata.message_type == MessageType.TRAIN
        if not (trains and workspace.config.secure_aggregation.enabled):
            return work()
        require_flower()
        from fedprompt.privacy.secure_aggregation.client import answer as masked

        return masked(workspace.config, message, RecordDict() if state is None else state, work)
    except UserError as error:
        log.error("this node cannot take part: %s", error)
        reason = _without_paths(str(error), node)
        if asked:
            return fault_reply(reason, message)
        return Message(Error(CLIENT_FAILED, reason), reply_to=message)


def _describe(workspace: Workspace, node: Node, message: Message) -> Message:
    description = describe(workspace, node.client)
    log.info(
        "client %d: %d training and %d test images",
        node.client,
        sum(description.train_C),
        sum(description.test_C),
    )
    for note in description.notes(workspace.dataset.class_names):
        log.warning("client %d: %s", node.client, note)
    return to_reply(description, message)


def _work(workspace: Workspace, node: Node, message: Message, run: str, run_id: int) -> Message:
    """Train or evaluate with this client's private tensors, and keep what training changed."""
    settings = message.content.get(CONFIG)
    if isinstance(settings, ConfigRecord) and settings.get(ZERO_SHOT):
        plain = workspace.with_method(method_class("zero_shot").Config())
        return handle(plain, [node.client], [message], {})[0][0]
    store = FileStore(state_folder(node, run, run_id) / f"client-{node.client:05d}")
    trains = message.metadata.message_type == MessageType.TRAIN
    # Training in round r builds on r - 1; an evaluation of round r sees what r has trained.
    kept = store.latest(server_round(message) + (not trains))
    private: dict[int, Tensors] = {node.client: kept} if kept else {}
    replies, changed = handle(workspace, [node.client], [message], private)
    for tensors in changed.values():
        store.put(server_round(message), tensors)
    return replies[0]


@lru_cache(maxsize=1)
def _workspace(text: str, experiment: str, overrides: str, node: Node) -> Workspace:
    """This process's workspace; a warm worker process opens it once."""
    config = on_node(parse(text) if text else compose(experiment, shlex.split(overrides)), node)
    use_threads(config.simulation)
    return open_workspace(config)


def _without_paths(text: str, node: Node | None) -> str:
    """A node's folders are its own: the server reads `<data>/beach/7.jpg`."""
    if node is not None:
        for name, folder in (
            ("data", node.data),
            ("state-dir", node.state_dir),
            ("cache-dir", node.cache_dir),
            ("checkpoint", node.checkpoint),
        ):
            if folder:
                text = text.replace(folder, f"<{name}>")
    return text


def _log_here() -> None:
    """Lines on stderr: Flower sets up its own logger only."""
    logger = logging.getLogger("fedprompt")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(levelname)s fedprompt: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
