"""What a node decides for itself, by Flower's `--node-config`, and how it changes an experiment.

An experiment comes from the server. Which folder is read, where private prompts and caches lie and
what computes is the node's own business: on a node that lends a folder an experiment names no path
at all (`config_paths`), and the weights are those that the node names itself.

    partition-id   number of this node's client, 0 .. K - 1
    data           its image folder, folder/class/*.jpg
    state-dir      folder for private prompts; else $FEDPROMPT_STATE, ~/.local/state/fedprompt
    cache-dir      feature cache; else $FEDPROMPT_CACHE, ~/.cache/fedprompt
    device         auto, cpu or cuda
    threads        CPU threads; else as the experiment says
    checkpoint     local file with the backbone's weights
    worker         socket of the node's warm process

    require-secure-aggregation   true: the server must not see this node's change, only a sum
    require-noise                least noise multiplier that the node adds to its change
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedprompt.config.paths import without_paths
from fedprompt.config.schema import Config
from fedprompt.errors import UserError, did_you_mean

KEYS = {
    "partition-id", "data", "state-dir", "cache-dir", "device", "threads", "checkpoint", "worker",
    "require-secure-aggregation", "require-noise",
}  # fmt: skip
FLOWERS_OWN = {"num-partitions"}


@dataclass(frozen=True)
class Node:
    """A node's own settings."""

    client: int
    data: str | None = None
    state_dir: str | None = None
    cache_dir: str | None = None
    device: str | None = None
    threads: int | None = None
    checkpoint: str | None = None
    require_secure_aggregation: bool = False
    require_noise: float = 0.0


def read_node(node_config: Mapping[str, Any]) -> Node:
    """The settings in a `--node-config`.

    Raises:
        UserError: unknown key, or a value that cannot be.
    """
    for key in sorted(set(node_config) - KEYS - FLOWERS_OWN):
        raise UserError(f"--node-config: unknown key '{key}'.{did_you_mean(key, sorted(KEYS))}")
    client = node_config.get("partition-id")
    if isinstance(client, bool) or not isinstance(client, int) or client < 0:
        raise UserError(
            f"--node-config: partition-id is {client!r}; it must be this node's number, 0 or more."
        )
    threads = node_config.get("threads")
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int)):
        raise UserError(f"--node-config: threads is {threads!r}; it must be a whole number.")
    device = node_config.get("device")
    if device is not None and device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--node-config: device is {device!r}; it must be auto, cpu or cuda.")
    secure = node_config.get("require-secure-aggregation", False)
    if not isinstance(secure, bool):
        raise UserError(
            f"--node-config: require-secure-aggregation is {secure!r}; it must be true or false."
        )
    noise = node_config.get("require-noise", 0.0)
    if isinstance(noise, bool) or not isinstance(noise, int | float) or not 0 <= noise < math.inf:
        raise UserError(f"--node-config: require-noise is {noise!r}; it must be 0 or more.")

    def path(key: str) -> str | None:
        value = node_config.get(key)
        return None if value in (None, "") else str(Path(str(value)).expanduser())

    return Node(
        client, path("data"), path("state-dir"), path("cache-dir"), device, threads,
        path("checkpoint"), secure, float(noise),
    )  # fmt: skip


def on_node(config: Config, node: Node) -> Config:
    """The experiment as this node runs it: its own folder is its only data.

    Raises:
        UserError: the experiment has no such client, does not ask for the folder that this node
            lends, needs weights that the node does not name, or protects what the node sends less
            than the node requires.
    """
    _protects(config, node)
    clients = config.partition.clients
    if not 0 <= node.client < clients:
        raise UserError(
            f"this node is client {node.client}, but the experiment has {clients} clients "
            f"(0 to {clients - 1}); set partition.clients to the number of nodes."
        )
    if node.data is not None:
        config = _on_lender(config, node, node.data)
    elif config.data.source == "client_folders":
        raise UserError(
            "--node-config names no 'data' folder, and the experiment has "
            "data.source=client_folders."
        )
    backbone = config.backbone
    if node.device is not None:
        backbone = replace(backbone, device=node.device)  # type: ignore[arg-type]
    if node.checkpoint is not None:
        backbone = replace(backbone, checkpoint=node.checkpoint)
    grid = config.simulation
    if node.threads is not None:
        grid = replace(grid, threads=node.threads)
    output = replace(config.output, cache=node.cache_dir)
    return replace(config, backbone=backbone, simulation=grid, output=output)


def _protects(config: Config, node: Node) -> None:
    if node.require_secure_aggregation and not config.secure_aggregation.enabled:
        raise UserError(
            "secure aggregation is required here, and the experiment has "
            "secure_aggregation.enabled=false."
        )
    if config.privacy.noise < node.require_noise:
        raise UserError(
            f"noise of {node.require_noise:g} times the clip or more is required here, and the "
            f"experiment has privacy.noise={config.privacy.noise:g}."
        )
    if node.require_noise and config.privacy.noise_seed is not None:
        raise UserError(
            "noise is required here, and the experiment's privacy.noise_seed lets the server take "
            "it away again; leave it out."
        )


def _on_lender(config: Config, node: Node, folder: str) -> Config:
    """The experiment on a node that lends `folder`, without any path but this one."""
    if config.data.source != "client_folders":
        raise UserError(
            f"this node lends one image folder, and the experiment asks for data.source="
            f"{config.data.source}; only client_folders is answered."
        )
    if config.backbone.checkpoint is not None and node.checkpoint is None:
        raise UserError(
            "the experiment's weights are a file of the server's (backbone.checkpoint); give this "
            "node its own copy with --checkpoint."
        )
    config = without_paths(config)
    folders = _only(node.client, folder, config.partition.clients)
    return replace(config, data=replace(config.data, folders=folders))


def on_server(config: Config) -> Config:
    """The experiment as the server runs it: of the images it has its own test folder at most."""
    if config.data.source != "client_folders":
        return config
    data = replace(config.data, folders=[""] * config.partition.clients)
    return replace(config, data=data)


def state_folder(node: Node, run: str, run_id: int) -> Path:
    """This node's folder for the private tensors of one run, named by the server or by Flower.

    Raises:
        UserError: the server's name is no plain name.
    """
    name = run or f"run-{run_id}"
    if not re.fullmatch(r"\w[\w.-]{0,99}", name, flags=re.ASCII):
        raise UserError(f"the server calls the run {name[:120]!r}, which names no folder.")
    base = node.state_dir or os.environ.get("FEDPROMPT_STATE")
    root = Path(base) if base else Path.home() / ".local" / "state" / "fedprompt"
    return root.expanduser() / name


def _only(client: int, folder: str, clients: int) -> list[str]:
    return [folder if k == client else "" for k in range(clients)]
