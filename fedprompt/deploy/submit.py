"""Hand an experiment to a SuperLink and follow it to its end."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedprompt.config.paths import absolute
from fedprompt.config.schema import Config, to_yaml
from fedprompt.deploy.bundle import write_bundle, write_run_config
from fedprompt.deploy.folders import CONNECTION, ServerSite, public_keys
from fedprompt.errors import UserError
from fedprompt.experiment.display import Display
from fedprompt.files import write_bytes
from fedprompt.reports.run_data import CONFIG, SUMMARY

DEPLOYMENT, KEYED, LOG = "deployment.json", "nodes.json", "server.log"
ASK_S, POLL_S = 5.0, 1.0


def register(site: ServerSite, environment: Mapping[str, str]) -> dict[int, int]:
    """Make the keys in the server's folder known to the SuperLink; client of every node id.

    Raises:
        UserError: the SuperLink refuses one.
    """
    path = site.folder / KEYED
    known: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else {}
    for client, public in public_keys(site.folder).items():
        text = public.read_text()
        if known.get(str(client), {}).get("key") == text:
            continue
        said = _flwr(
            ["supernode", "register", str(public), CONNECTION, "--format", "json"], environment
        )
        found = re.search(r'"node-id":\s*"?(\d+)', said)
        if not found:
            raise UserError(f"the SuperLink did not register {public}: {_last(said)}")
        known[str(client)] = {"key": text, "node": int(found.group(1))}
        write_bytes(path, json.dumps(known, indent=2).encode())
    return {entry["node"]: int(client) for client, entry in known.items()}


def keyed(site: ServerSite) -> dict[int, int]:
    """Client of every node id that has been registered."""
    path = site.folder / KEYED
    known = json.loads(path.read_text()) if path.is_file() else {}
    return {entry["node"]: int(client) for client, entry in known.items()}


def new_run(config: Config) -> Config:
    """The experiment as it is handed over: its paths absolute, its run folder fixed, no client's.

    Raises:
        UserError: the run folder holds a run already.
    """
    config = absolute(config)
    output = config.output
    if output.dir is not None:
        path = Path(output.dir).expanduser().resolve()
    else:
        stem = f"{config.experiment}-{config.method.name}-seed{config.seed}"
        path = _first_free(Path(output.root).expanduser().resolve() / stem)
    if (path / CONFIG).exists():
        raise UserError(f"{path} already holds a run; go on with --resume {path}.")
    if output.cache is not None:
        output = replace(output, cache=str(Path(output.cache).expanduser().resolve()))
    data = replace(config.data, folders=[])
    return replace(config, output=replace(output, dir=str(path)), data=data)


def start(
    site: ServerSite, settings: Mapping[str, str], scratch: Path, environment: Mapping[str, str]
) -> int:
    """Hand over a run; returns Flower's id of it. `settings` are the run config's.

    Raises:
        UserError: the SuperLink refuses it.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    app = write_bundle(scratch / "app")
    nodes = ",".join(f"{node}:{client}" for node, client in keyed(site).items())
    write_run_config(scratch / "run.toml", {**settings, "nodes": nodes})
    command = ["run", str(app), CONNECTION, "-c", str(scratch / "run.toml"), "--format", "json"]
    said = _flwr(command, environment)
    found = re.search(r'"run-id":\s*"?(\d+)', said)
    if not found:
        raise UserError(f"the SuperLink did not take the run: {_last(said)}")
    return int(found.group(1))


def settings_of(config: Config) -> dict[str, str]:
    """The run config of a new run; nodes keep its private prompts under a name of its own."""
    return {"config": to_yaml(config), "run": uuid.uuid4().hex, "resume": ""}


def settings_to_resume(path: Path) -> dict[str, str]:
    """The run config that goes on with a run folder.

    Raises:
        UserError: it holds no run, or one that was not a deployment.
    """
    try:
        run = str(json.loads((path / DEPLOYMENT).read_text())["run"])
        text = (path / CONFIG).read_text(encoding="utf-8")
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} holds no deployment's run ({CONFIG}, {DEPLOYMENT}).") from None
    return {"config": text, "run": run, "resume": str(path.resolve())}


def status(run_id: int, environment: Mapping[str, str]) -> str:
    """Flower's word for a run's state, e.g. `running`, `finished:failed`."""
    said = _flwr(["ls", CONNECTION, "--run-id", str(run_id), "--format", "json"], environment)
    found = re.search(r'"status":\s*"([^"]+)"', said)
    return found.group(1) if found else f"unknown ({_last(said)})"


def is_complete(path: Path) -> bool:
    """Whether a run folder holds a finished run."""
    return (path / SUMMARY).is_file()


def follow(
    path: Path, display: Display, *, status: Callable[[], str], check: Callable[[], None]
) -> None:
    """Show the server's lines of a run until it is over.

    Args:
        path: the run folder.
        display: where lines go.
        status: Flower's word for the run's state; asked now and then.
        check: raises where going on makes no sense.
    """
    shown, asked = 0, time.monotonic()
    while True:
        check()
        over = is_complete(path)
        if not over and time.monotonic() - asked > ASK_S:
            asked = time.monotonic()
            over = status().startswith("finished")
        lines = _lines(path / LOG)
        for line in lines[shown:]:
            display.message(line)
        shown = max(shown, len(lines))
        if over:
            return
        time.sleep(POLL_S)


def conclude(path: Path, display: Display, resume: str, logs: Path) -> Path:
    """Show a run's result; returns its folder.

    Raises:
        UserError: it is not complete; `resume` is the command that goes on with it, and `logs` is
            where the server's processes write.
    """
    if not is_complete(path):
        lines = _lines(path / LOG)
        if not lines:
            raise UserError(f"the run never began; {logs / 'superexec.log'} says why.")
        last = lines[-1]
        raise UserError(f"the run did not finish: {last}; go on with '{resume}'.")
    display.finish(json.loads((path / SUMMARY).read_text()), path)
    return path


def _lines(log: Path) -> list[str]:
    return log.read_text(errors="replace").split("\n")[:-1] if log.is_file() else []


def _flwr(arguments: list[str], environment: Mapping[str, str]) -> str:
    """What one of Flower's own commands prints."""
    try:
        finished = subprocess.run(
            ["flwr", *arguments],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"'flwr {arguments[0]}' cannot be run: {error}.") from None
    return finished.stdout + finished.stderr


def _last(said: str) -> str:
    return " ".join(said.split())[-400:] or "it said nothing"


def _first_free(stem: Path) -> Path:
    path, number = stem, 2
    while path.exists():
        path = stem.with_name(f"{stem.name}-{number}")
        number += 1
    return path
