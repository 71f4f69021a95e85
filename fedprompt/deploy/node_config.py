"""What a node decides for itself, and how it changes an experiment that the server sends.

`read_node_settings` and `on_node` run on a node, `on_server` runs on the server. The experiment
comes from the server, but which folder is read, where private prompts and caches are stored and
which device computes is decided by the node's administrator, in Flower's `--node-config`. A node
opens no path that an experiment names (`experiment/paths.py`), and its weights are those of the
pretrained tag or those that it names itself. The only exception are nodes on the server's machine.

    partition-id   the number of this node's client, 0 .. K - 1
    data           its image folder, folder/class/*.jpg
    root           its copy of the data set, for experiments in which every node opens the whole set
    state-dir      folder for private prompts; default $FEDPROMPT_STATE, ~/.local/state/fedprompt
    cache-dir      folder for cached features; default $FEDPROMPT_CACHE, ~/.cache/fedprompt
    device         auto, cpu or cuda
    threads        CPU threads; default as in the experiment
    checkpoint     local file with the backbone's weights, or the model's folder (local-dir)
    weights        format in which it keeps the backbone's weights; default as in the experiment
    worker         socket of the node's worker
    same-machine   true: this node runs on the server's machine, so paths that the experiment names
                   mean the same here and are opened, unless the node has `data`

    policy         YAML file with what this node answers (governance/policy.py)
    records        folder for the audit log and the privacy ledger; without it none is kept
    server         the server's address, for the audit log

    require-secure-aggregation   true: refuse experiments in which the server sees this node's
                                 update and not only a sum
    require-noise                least noise multiplier that the node adds to its update
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedprompt.backbone.devices import KINDS
from fedprompt.config.schema import FORMATS, LOCAL_FOLDER, SECTIONS, Config, WeightFormat
from fedprompt.config.shipped import shipped_names
from fedprompt.data.sources.client_folders import ClientFoldersConfig
from fedprompt.data.sources.parts.common_labels import names as label_lists
from fedprompt.errors import UserError, did_you_mean
from fedprompt.evaluation.registry import protocol_class
from fedprompt.experiment.paths import named_paths, without_paths

KEYS = {
    "partition-id", "data", "root", "state-dir", "cache-dir", "device", "threads", "checkpoint",
    "weights", "worker", "same-machine", "policy", "records", "server",
    "require-secure-aggregation", "require-noise",
}  # fmt: skip
SIMULATED = "num-partitions"
"""Key that Flower's simulation engine sets, whose clients run on the server's machine."""

HUB_ID = r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?"
"""Pattern of a data set's id on the Hugging Face hub."""


@dataclass(frozen=True)
class NodeSettings:
    """A node's own settings; the keys of `--node-config` are explained above."""

    client: int
    data: str | None = None
    state_dir: str | None = None
    cache_dir: str | None = None
    device: str | None = None
    threads: int | None = None
    checkpoint: str | None = None
    require_secure_aggregation: bool = False
    require_noise: float = 0.0
    root: str | None = None
    same_machine: bool = False
    policy: str | None = None
    records: str | None = None
    server: str = ""
    weights: WeightFormat | None = None


def read_node_settings(node_config: Mapping[str, Any]) -> NodeSettings:
    """Check the entries of a `--node-config`.

    Args:
        node_config: values by key; the keys are explained at the top of this module.

    Returns:
        The settings, with `~` expanded in paths and None where the default applies.

    Raises:
        UserError: a key is unknown, or a value has the wrong type or is out of range.
    """
    for key in sorted(set(node_config) - KEYS - {SIMULATED}):
        raise UserError(f"--node-config: unknown key '{key}'.{did_you_mean(key, sorted(KEYS))}")
    # `True` is an `int` in Python, hence the checks for `bool` here and below.
    client = node_config.get("partition-id")
    if isinstance(client, bool) or not isinstance(client, int) or client < 0:
        raise UserError(
            f"--node-config: partition-id is {client!r}; it must be this node's number, 0 or more."
        )
    threads = node_config.get("threads")
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int)):
        raise UserError(f"--node-config: threads is {threads!r}; it must be a whole number.")
    device = node_config.get("device")
    if device is not None and device not in KINDS:
        raise UserError(
            f"--node-config: device is {device!r}; it must be one of {', '.join(KINDS)}."
        )
    weights = node_config.get("weights") or None
    if weights is not None and weights not in FORMATS:
        raise UserError(
            f"--node-config: weights is {weights!r}; it must be one of {', '.join(FORMATS)}."
        )
    flags = {"require-secure-aggregation": False, "same-machine": SIMULATED in node_config}
    for key, default in flags.items():
        flags[key] = node_config.get(key, default)
        if not isinstance(flags[key], bool):
            raise UserError(f"--node-config: {key} is {flags[key]!r}; it must be true or false.")
    noise = node_config.get("require-noise", 0.0)
    if isinstance(noise, bool) or not isinstance(noise, int | float) or not 0 <= noise < math.inf:
        raise UserError(f"--node-config: require-noise is {noise!r}; it must be 0 or more.")

    def path(key: str) -> str | None:
        value = node_config.get(key)
        return None if value in (None, "") else str(Path(str(value)).expanduser())

    return NodeSettings(
        client, path("data"), path("state-dir"), path("cache-dir"), device, threads,
        path("checkpoint"), flags["require-secure-aggregation"], float(noise), path("root"),
        flags["same-machine"], path("policy"), path("records"), str(node_config.get("server", "")),
        weights,
    )  # fmt: skip


def on_node(config: Config, node: NodeSettings) -> Config:
    """The experiment as this node runs it, with the node's own folder as its only data.

    Args:
        config: the experiment, as the server sends it.
        node: the node's settings, which take precedence.

    Returns:
        The experiment with the node's folder, device, threads, weights and cache.

    Raises:
        UserError: the experiment has no such client, does not use the folder that this node lends,
            needs files that the node does not name, or protects the node's update less than the
            node requires.
    """
    _check_protection(config, node)
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
            "the experiment has data.source=client_folders, but this node names no image folder; "
            "start it with --data FOLDER ('data' in --node-config)."
        )
    elif not node.same_machine:
        config = _with_own_root(config, node)
    backbone = config.backbone
    weights = node.weights or backbone.weights_of(node.client)
    # Which model a node has is its own decision as well (--checkpoint).
    backbone = replace(backbone, weights=weights, client_weights=[], client_models=[])
    if node.device is not None:
        backbone = replace(backbone, device=node.device)  # type: ignore[arg-type]
    if node.checkpoint is not None:
        if backbone.model.startswith(LOCAL_FOLDER):
            backbone = replace(backbone, model=f"{LOCAL_FOLDER}{node.checkpoint}")
        else:
            backbone = replace(backbone, checkpoint=node.checkpoint)
    simulation = config.simulation
    if node.threads is not None:
        simulation = replace(simulation, threads=node.threads)
    # The experiment's cache is a folder of the server; None selects this machine's default.
    output = replace(config.output, cache=node.cache_dir)
    return replace(config, backbone=backbone, simulation=simulation, output=output)


def on_server(config: Config) -> Config:
    """The experiment as the server runs it: it opens its own test folder and no client's folder.

    Raises:
        UserError: a protocol or an attack needs what only a simulation can do, or the config
            simulates what real nodes do by themselves.
    """
    for name in ("conditions", "clock", "asynchronous"):
        if getattr(config, name) != SECTIONS[name]():
            raise UserError(
                f"config: section '{name}' simulates what real nodes do by themselves; leave it "
                "out of a deployment, or use 'fedprompt run'."
            )
    if config.attack.kind != "none":
        raise UserError(
            f"config: attack.kind={config.attack.kind} makes clients of a simulation ('fedprompt "
            "run') attack; those of a deployment never do: set attack.kind=none."
        )
    for name in config.protocols:
        if what := protocol_class(name).simulation_only:
            raise UserError(
                f"config: protocol '{name}' {what}, which only a simulation can ('fedprompt "
                "run'); leave it out of protocols."
            )
    if not isinstance(config.data, ClientFoldersConfig):
        return config
    data = replace(config.data, folders=[""] * config.partition.clients)
    return replace(config, data=data)


def _check_protection(config: Config, node: NodeSettings) -> None:
    if node.require_secure_aggregation and not config.secure_aggregation.enabled:
        raise UserError(
            "this node requires secure aggregation, but the experiment has "
            "secure_aggregation.enabled=false."
        )
    if config.privacy.noise < node.require_noise:
        raise UserError(
            f"this node requires noise of at least {node.require_noise:g} times the clip, but the "
            f"experiment has privacy.noise={config.privacy.noise:g}."
        )
    if node.require_noise and config.privacy.noise_seed is not None:
        raise UserError(
            "this node requires noise, but with the experiment's privacy.noise_seed the server "
            "could compute the noise and subtract it; leave privacy.noise_seed out."
        )


def _on_lender(config: Config, node: NodeSettings, folder: str) -> Config:
    """The experiment on a node that lends `folder`, with no other path in it."""
    if not isinstance(config.data, ClientFoldersConfig):
        raise UserError(
            "this node lends an image folder and accepts only experiments with "
            f"data.source=client_folders, but this one has data.source={config.data.source}."
        )
    _check_weights(config, node)
    kept = _shipped_files(config)
    config = without_paths(config)
    data: Any = config.data  # of client folders, as checked above
    folders = [folder if k == node.client else "" for k in range(config.partition.clients)]
    return replace(config, data=replace(data, folders=folders, **kept))


def _with_own_root(config: Config, node: NodeSettings) -> Config:
    """The experiment on a node that opens the whole data set, with no path of the server in it."""
    _check_weights(config, node)
    named = named_paths(config.data)
    # An id on the hub is the same on every machine; only a folder with such a name is not.
    hub = str(named.get("hub_id", ""))
    kept = {"hub_id": hub} if re.fullmatch(HUB_ID, hub) and not Path(hub).exists() else {}
    kept |= _shipped_files(config)
    own = {"root": node.root} if node.root and hasattr(config.data, "root") else {}
    for key in sorted(named.keys() - kept.keys() - own.keys()):
        raise UserError(
            f"the experiment's data.{key} is a path on the server, and this node opens no path "
            "that the server names; start it with --root FOLDER for its own copy of the data set."
        )
    if config.partition.file is not None:
        raise UserError(
            "the experiment's partition.file is a file on the server, and this node opens no path "
            "that the server names; use data.source=client_folders and start it with --data."
        )
    config = without_paths(config)
    data: Any = config.data  # which of these keys it has depends on the source
    return replace(config, data=replace(data, **kept, **own))


def _shipped_files(config: Config) -> dict[str, str]:
    """The keys that name shipped files, if they are set: these are the same on every machine.

    Raises:
        UserError: one is a path. Without its sentences or labels, a node would learn otherwise.
    """
    known = {"descriptions": shipped_names("descriptions"), "common_labels": label_lists()}
    kept = {key: name for key in known if (name := getattr(config.data, key, None)) is not None}
    for key, name in kept.items():
        if name not in known[key]:
            raise UserError(
                f"the experiment's data.{key} is a file on the server, and this node opens no "
                f"path that the server names; name a shipped one ({', '.join(known[key])})."
            )
    return kept


def _check_weights(config: Config, node: NodeSettings) -> None:
    if config.backbone.model.startswith(LOCAL_FOLDER) and node.checkpoint is None:
        raise UserError(
            "the experiment's model (backbone.model) is a folder on the server; start this node "
            "with its own copy of the folder: --checkpoint FOLDER."
        )
    if config.backbone.checkpoint is not None and node.checkpoint is None:
        raise UserError(
            "the experiment's weights (backbone.checkpoint) are a file on the server; start this "
            "node with its own copy: --checkpoint FILE."
        )


def state_folder(node: NodeSettings, run: str, run_id: int) -> Path:
    """This node's folder for the private tensors of one run.

    Args:
        node: the node's settings.
        run: the run's name, given by the server; "" if the run was started without our commands.
        run_id: Flower's id of the run, which names the folder if `run` is empty.

    Raises:
        UserError: the name could lead out of the node's state folder.
    """
    name = run or f"run-{run_id}"
    # The name comes from the server: without separators and leading dots, it stays in the folder.
    if not re.fullmatch(r"\w[\w.-]{0,99}", name, flags=re.ASCII):
        raise UserError(f"the server calls the run {name[:120]!r}, which is not a folder name.")
    base = node.state_dir or os.environ.get("FEDPROMPT_STATE")
    root = Path(base) if base else Path.home() / ".local" / "state" / "fedprompt"
    return root.expanduser() / name
