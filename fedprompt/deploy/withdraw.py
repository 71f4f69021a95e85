"""`deploy withdraw`: a run again, exactly as it would have been without one site.

Runs on the administrator's terminal on the server's machine. Rounds are deterministic, so the
recorded experiment without a site's node is the federation in which the site never took part: exact
unlearning by retraining, against which any faster way would have to be measured. The remaining
sites train again, from the same start and with the same draws; what the site had contributed to the
first run is in none of the new run's prompts. Copies of the first run's prompts that others hold
cannot be called back.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedprompt.config.schema import Config
from fedprompt.deploy.folders import ServerFolder
from fedprompt.deploy.joining.server_side import members
from fedprompt.deploy.submit import (
    is_complete,
    resume_on_server,
    run_on_server,
    settings_to_resume,
)
from fedprompt.errors import UserError
from fedprompt.experiment.checkpoint import read_checkpoint
from fedprompt.experiment.compose import parse
from fedprompt.experiment.display import Display
from fedprompt.files import write_bytes
from fedprompt.reports.run_data import CHECKPOINT, CONFIG, SUMMARY

FILE = "withdrawal.json"
"""File in the new run's folder: of what it is the repetition, and how the results differ."""


def withdraw(server: ServerFolder, run: Path, client: int, display: Display) -> dict[str, Any]:
    """Repeat a finished run without one of its clients, and compare the two.

    Args:
        server: the server's folder; `deploy server` must be running, and so must the nodes of the
            remaining clients.
        run: the folder of the finished run, which is left as it is.
        client: the client whose contribution is to be removed.
        display: where the new run's lines and its result are shown.

    Returns:
        The content of `FILE`.

    Raises:
        UserError: `run` is no finished run of a deployment, the client has not been shut out, or
            the new run fails.
    """
    config = parse(settings_to_resume(run)["config"])
    if not is_complete(run):
        raise UserError(f"the run in {run} has not finished; resume it first.")
    clients = config.partition.clients
    if not 0 <= client < clients:
        raise UserError(f"--client is {client}; the run in {run} has clients 0 to {clients - 1}.")
    if any(member.client == client for member in members(server.path)):
        raise UserError(
            f"client {client} may still take part; shut its node out first: "
            f"fedprompt deploy revoke {server.path} {client}"
        )
    new = without_client(config, run, client)
    assert new.output.dir is not None
    repeated = Path(new.output.dir)
    # A command that was killed goes on where it was.
    if not (repeated / CONFIG).is_file():
        run_on_server(server, new, display)
    elif not is_complete(repeated):
        resume_on_server(server, repeated, display)
    found = _difference(run, repeated, client)
    write_bytes(repeated / FILE, (json.dumps(found, indent=2) + "\n").encode())
    return found


def without_client(config: Config, run: Path, client: int) -> Config:
    """The experiment of a run as it is repeated without one of its clients.

    Its number of clients stays: the draws of the others depend on it.
    """
    federation, rest = config.federation, config.partition.clients - 1
    most = min(federation.min_nodes or rest, rest)
    path = run.resolve().with_name(f"{run.resolve().name}-without-client-{client}")
    return replace(
        config,
        federation=replace(federation, min_nodes=most),
        output=replace(config.output, dir=str(path)),
    )


def _difference(run: Path, repeated: Path, client: int) -> dict[str, Any]:
    before, after = (json.loads((folder / SUMMARY).read_bytes()) for folder in (run, repeated))
    return {
        "run": str(run),
        "repeated": str(repeated),
        "without_client": client,
        "global_accuracy": [_accuracy(before, "global"), _accuracy(after, "global")],
        "personal_accuracy": [_accuracy(before, "personal"), _accuracy(after, "personal")],
        "distance_of_shared_prompts": _distance(run, repeated),
    }


def _accuracy(summary: dict[str, Any], part: str) -> float | None:
    values = summary.get(part) or {}
    value = values.get("mean") if part == "personal" else values.get("accuracy")
    return None if value is None else float(value)


def _distance(run: Path, repeated: Path) -> float:
    """L2 distance of the shared prompts at the end of two runs, over all tensors."""
    first, second = (read_checkpoint(folder / CHECKPOINT).shared for folder in (run, repeated))
    squares = [(first[name].double() - second[name].double()).square().sum() for name in first]
    return float(torch.stack(squares).sum().sqrt())
