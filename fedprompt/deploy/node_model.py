"""The personal model that a node has trained: kept by its worker, used by `deploy predict`.

The private tensors are in the files of `private_store`. Beside them, the node keeps one more file
with the rest of its model: the last shared tensors that the server has sent, the names of the
classes, and the experiment as this node runs it. With both, the model can be used on the node, when
the run is over and without the server.

    <state>/<run>/client-<k>/model.safetensors
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedprompt.backbone.loading import load_clip
from fedprompt.config.schema import Config, to_yaml
from fedprompt.data.cache_files import default_cache_dir
from fedprompt.deploy.private_store import FileStore
from fedprompt.errors import UserError
from fedprompt.experiment.companions import with_companions
from fedprompt.experiment.compose import parse
from fedprompt.experiment.predict import PromptModel
from fedprompt.files import write_bytes
from fedprompt.files.tensors import read_tensors, to_bytes
from fedprompt.methods.base import Task, Tensors
from fedprompt.methods.registry import method_class
from fedprompt.optimizer import without_momentum
from fedprompt.workspace import Workspace, check_private

MODEL = "model.safetensors"
PLACES = ("", "*/", "*/*/", "state/*/*/")
"""Where the file is, below a folder that the administrator may name: that of a client, a run, a
node's state, or the node."""
log = logging.getLogger("fedprompt.node")


@dataclass(frozen=True)
class KeptModel:
    """What a node has kept of its model.

    Args:
        folder: the client's folder in the node's state.
        client: the number of the client.
        server_round: the round in which the shared tensors were sent.
        config: the experiment as this node runs it.
        class_names: the classes in label order.
        shared: the shared tensors, and what the server sent to this client alone, by name.
    """

    folder: Path
    client: int
    server_round: int
    config: Config
    class_names: tuple[str, ...]
    shared: Tensors

    @property
    def title(self) -> str:
        """One line that says which model this is."""
        return (
            f"client {self.client} of '{self.config.experiment}' ({self.config.method.name}), "
            f"shared prompts of round {self.server_round}"
        )


def keep_model(
    folder: Path, workspace: Workspace, client: int, server_round: int, shared: Tensors
) -> None:
    """Write what the node needs to use its model later.

    A disk that is full costs no more than this file: the update does not depend on it.

    Args:
        folder: the client's folder in the node's state.
        workspace: the node's workspace.
        client: the number of the client.
        server_round: the round in which the server sent the tensors.
        shared: these tensors by name.
    """
    header = {
        "client": str(client),
        "round": str(server_round),
        "class_names": json.dumps(workspace.dataset.class_names),
        "config": to_yaml(workspace.config),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_bytes(folder / MODEL, to_bytes(shared, header), mode=0o600)
    except OSError as error:
        log.warning(
            "the model of round %d cannot be kept in %s: %s", server_round, folder, error.strerror
        )


def find_model(path: Path) -> KeptModel:
    """Read the model that a node has kept.

    Args:
        path: the node's folder, its state folder, or the folder of one run or client in there.

    Returns:
        The model; if there are several runs, that of the run in which the node has taken part last.

    Raises:
        UserError: there is no model, there are those of several clients, or the file is damaged.
    """
    if not path.is_dir():
        raise UserError(f"there is no folder {path}.")
    found = next((files for place in PLACES if (files := list(path.glob(place + MODEL)))), [])
    if not found:
        raise UserError(
            f"{path} holds no model; name the node's folder, or its --state folder, after the node "
            "has taken part in a round."
        )
    clients = sorted({file.parent.name for file in found})
    if len(clients) > 1:
        raise UserError(
            f"{path} holds the models of {len(clients)} clients; name one client's folder, for "
            f"example {found[0].parent}."
        )
    return _read(max(found, key=lambda file: file.stat().st_mtime))


def load_model(kept: KeptModel) -> PromptModel:
    """Open the personal model: the frozen CLIP with the kept shared and the last private tensors.

    Raises:
        UserError: the weights or the private tensors cannot be read.
    """
    config = kept.config
    cache_dir = default_cache_dir(config.output.cache)
    clip = with_companions(load_clip(config.backbone, cache_dir), config, cache_dir)
    task = Task(kept.class_names, tuple(config.data.templates))
    method = method_class(config.method.name)(config.method, clip, task)
    # A client that has never trained has the values that it would start from.
    private, _ = without_momentum(FileStore(kept.folder).latest(sys.maxsize) or {})
    if private:
        check_private(method, private, config.seed)
    private = private or method.init_private(config.seed, kept.client)
    return PromptModel(clip, method, kept.shared, private, config.data)


def _read(path: Path) -> KeptModel:
    try:
        shared, header = read_tensors(path, required=True)
        names: Sequence[str] = json.loads(header["class_names"])
        client, server_round = int(header["client"]), int(header["round"])
        config = header["config"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} cannot be read ({' '.join(str(error).split())}); the node writes it again in "
            "the next round."
        ) from None
    return KeptModel(path.parent, client, server_round, parse(config), tuple(names), shared)
