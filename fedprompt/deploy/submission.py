"""What the server app of a run needs and no node may read: paths of the server, who its nodes are.

Flower sends a run's config to every node of the federation, so only the run's name is in it.
`deploy run` writes a file of that name into the server's folder, and the server app, which is a
process of the same machine and user, reads it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedprompt.deploy.folders import SERVER_FOLDER, ServerFolder
from fedprompt.deploy.key_registration import registered_clients
from fedprompt.errors import UserError
from fedprompt.files import write_bytes

FOLDER = "submitted"


@dataclass(frozen=True)
class Submission:
    """A run as it was submitted.

    Args:
        config: the complete experiment as text.
        run: the name under which nodes store the run's private prompts.
        resume: the run folder to resume; empty for a new run.
        registered: the client of every registered node id.
    """

    config: str
    run: str
    resume: str
    registered: Mapping[int, int]


def write_submission(server: ServerFolder, settings: Mapping[str, str]) -> None:
    """Write the file that the server app reads.

    Args:
        server: the server's folder.
        settings: the keys `config`, `run` and `resume` of a `Submission`.

    Raises:
        UserError: the folder cannot be written.
    """
    # JSON's keys are texts.
    nodes = {str(node): client for node, client in registered_clients(server).items()}
    path = _path(server.path, settings["run"])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, json.dumps({**settings, "nodes": nodes}).encode(), mode=0o600)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}.") from None


def read_submission(run: str) -> Submission:
    """Read what `write_submission` wrote for this run.

    Raises:
        UserError: there is no such file, because the run was not submitted by `deploy run` on this
            server.
    """
    folder = os.environ.get(SERVER_FOLDER, "")
    # A name with separators could lead to another file.
    if not folder or not re.fullmatch(r"[0-9a-f]{1,64}", run):
        raise UserError(
            "this server app was not started by 'fedprompt deploy server'; restart the server, and "
            "submit the run with 'fedprompt deploy run'."
        )
    path = _path(Path(folder), run)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        nodes = {int(node): int(client) for node, client in content["nodes"].items()}
        return Submission(content["config"], content["run"], content["resume"], nodes)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or "it is damaged"
        raise UserError(
            f"cannot read {path} ({reason}); submit the run again with 'fedprompt deploy run'."
        ) from None


def _path(server: Path, run: str) -> Path:
    return server / FOLDER / f"{run}.json"
