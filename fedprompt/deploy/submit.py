"""Hands an experiment to a SuperLink and follows the run to its end.

Runs on the administrator's terminal on the server's machine, in `deploy run` and `deploy local`.
The run itself is Flower's ServerApp (server_app.py), a process of the SuperExec; it continues if
this process ends. Both meet in the run folder: the server app writes its log there, and this
process prints it.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from fedprompt import __version__
from fedprompt.config.schema import Config, to_yaml
from fedprompt.data.sources.client_folders import ClientFoldersConfig
from fedprompt.deploy.bundle import write_bundle, write_run_config
from fedprompt.deploy.flower_commands import last_words, run_flwr
from fedprompt.deploy.folders import CONNECTION, ServerFolder
from fedprompt.deploy.processes import flower_environment
from fedprompt.deploy.submission import write_submission
from fedprompt.deploy.versions import VERSIONS
from fedprompt.errors import UserError
from fedprompt.experiment.compose import parse
from fedprompt.experiment.display import Display
from fedprompt.experiment.new_folder import default_path
from fedprompt.experiment.paths import absolute, hidden
from fedprompt.experiment.run_folder import is_held
from fedprompt.experiment.summary import show_result
from fedprompt.files.checksums import read_verified
from fedprompt.reports.run_data import CONFIG, SUMMARY
from fedprompt.runtime.endings import advice, check_signals, command_line

DEPLOYMENT, LOG = "deployment.json", "server.log"
STATUS_S, POLL_S = 5.0, 1.0
"""Seconds between two questions about the run's state, and between two looks at its log."""


def run_on_server(server: ServerFolder, config: Config, display: Display) -> Path:
    """Run an experiment on the nodes of the server that runs on this machine.

    Args:
        server: the server's folder.
        config: the experiment; `data.folders` is not sent, because every node has its own.
        display: where the run's lines and its result are shown.

    Returns:
        The run folder.

    Raises:
        UserError: the run folder is in use, the SuperLink
            refuses the run, or the run has failed.
    """
    if isinstance(config.data, ClientFoldersConfig) and config.data.folders:
        # An experiment that ran on one machine runs on nodes unchanged; `new_run` empties the list.
        display.message("data.folders is not used: every node names its own folder with --data.")
    submitted = new_run(config)
    assert submitted.output.dir is not None
    return _submit_and_follow(server, settings_of(submitted), Path(submitted.output.dir), display)


def resume_on_server(server: ServerFolder, path: Path, display: Display) -> Path:
    """Resume the run in the folder `path` on the server that runs on this machine.

    A run that is in progress is not resumed but followed to its end.

    Args:
        server: the server's folder.
        path: the run folder.
        display: where the run's lines and its result are shown.

    Returns:
        The run folder.

    Raises:
        UserError: `path` holds no run of a deployment, or the run cannot be resumed.
    """
    settings, path = settings_to_resume(path), path.resolve()
    if not is_held(path):
        return _submit_and_follow(server, settings, path, display)
    run_id = _run_id(path)
    display.message(f"the run in {path} is in progress; following run {run_id}")
    return _follow_on_server(server, run_id, path, display)


def new_run(config: Config) -> Config:
    """The experiment as it is submitted: with absolute paths and a fixed run folder.

    Raises:
        UserError: the run folder already contains a run.
    """
    config = absolute(config)
    output = config.output
    if output.dir is not None:
        path = Path(output.dir).expanduser().resolve()
    else:
        path = _first_free(default_path(config).resolve())
    if (path / CONFIG).exists():
        raise UserError(f"{path} already contains a run; resume it with --resume {path}.")
    if output.cache is not None:
        output = replace(output, cache=str(Path(output.cache).expanduser().resolve()))
    data = config.data
    if isinstance(data, ClientFoldersConfig):
        # Every node knows its image folder, so the folders of clients need not cross the network.
        data = replace(data, folders=[])
    return replace(config, output=replace(output, dir=str(path)), data=data)


def settings_of(config: Config) -> dict[str, str]:
    """A new run's settings: the experiment, and the name for its private prompts.

    Nodes store their private prompts under that name, so that two runs never share any.
    """
    return {"config": to_yaml(config), "run": uuid.uuid4().hex, "resume": ""}


def settings_to_resume(path: Path) -> dict[str, str]:
    """The settings that resume the run in the folder `path`.

    Raises:
        UserError: the folder contains no run, or one that was not a deployment.
    """
    try:
        run = str(json.loads((path / DEPLOYMENT).read_text())["run"])
        text = read_verified(path / CONFIG).decode("utf-8")
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{path} does not contain the run of a deployment ({CONFIG} and {DEPLOYMENT})."
        ) from None
    return {"config": text, "run": run, "resume": str(path.resolve())}


def start_run(
    server: ServerFolder,
    settings: Mapping[str, str],
    scratch: Path,
    environment: Mapping[str, str],
    *,
    same_machine: bool = False,
) -> int:
    """Submit a run to the SuperLink.

    Flower sends a run's config to every node. It therefore holds the experiment without the paths
    of this machine; the server app reads the complete settings in the server's folder.

    Args:
        server: the server's folder.
        settings: the run's settings, from `settings_of` or `settings_to_resume`.
        scratch: folder for the app and the run config.
        environment: variables for Flower's command.
        same_machine: whether all nodes run on this machine and open the paths of the experiment.

    Returns:
        Flower's id of the run.

    Raises:
        UserError: the SuperLink refuses the run.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    app = write_bundle(scratch / "app")
    write_submission(server, settings)
    text = settings["config"] if same_machine else to_yaml(hidden(parse(settings["config"])))
    sent = {"config": text, "run": settings["run"], VERSIONS: __version__}
    write_run_config(scratch / "run.toml", sent)
    command = ["run", str(app), CONNECTION, "-c", str(scratch / "run.toml"), "--format", "json"]
    output = run_flwr(command, environment)
    run_id = re.search(r'"run-id":\s*"?(\d+)', output)
    if not run_id:
        raise UserError(f"the SuperLink did not accept the run: {last_words(output)}")
    return int(run_id.group(1))


def run_status(run_id: int, environment: Mapping[str, str]) -> str:
    """Flower's word for a run's state, for example `running` or `finished:failed`."""
    command = ["ls", CONNECTION, "--run-id", str(run_id), "--format", "json"]
    output = run_flwr(command, environment)
    status = re.search(r'"status":\s*"([^"]+)"', output)
    return status.group(1) if status else f"unknown ({last_words(output)})"


def is_complete(path: Path) -> bool:
    """Whether a run folder contains a finished run."""
    return (path / SUMMARY).is_file()


def follow(
    path: Path, display: Display, *, status: Callable[[], str], check: Callable[[], None]
) -> None:
    """Show the lines that the server app logs, until the run is over.

    Args:
        path: the run folder.
        display: where the lines are shown.
        status: returns Flower's word for the run's state; it is called every `STATUS_S` seconds.
        check: is called every `POLL_S` seconds; raises if waiting any longer makes no sense.
    """
    num_shown, asked = 0, time.monotonic()
    while True:
        check_signals()
        check()
        # Checked before the log is read, so that the last lines of a finished run are shown.
        over = is_complete(path)
        # Every question starts a `flwr` process, so the run folder is checked more often.
        if not over and time.monotonic() - asked > STATUS_S:
            asked = time.monotonic()
            over = status().startswith("finished")
        lines = _lines(path / LOG)
        for line in lines[num_shown:]:
            display.message(line)
        num_shown = max(num_shown, len(lines))
        if over:
            return
        time.sleep(POLL_S)


def conclude(path: Path, display: Display, resume: str, logs: Path) -> Path:
    """Show the result of a run that is over.

    Args:
        path: the run folder.
        display: where the result is shown.
        resume: the command that resumes the run.
        logs: the folder with the logs of the server's processes.

    Returns:
        The run folder.

    Raises:
        UserError: the run has not finished.
    """
    if not is_complete(path):
        lines = _lines(path / LOG)
        if not lines:
            raise UserError(f"the run did not start; for the reason, see {logs / 'superexec.log'}.")
        raise UserError(f"the run did not finish: {lines[-1]}; resume it with '{resume}'.")
    show_result(display, json.loads((path / SUMMARY).read_text()), path)
    return path


def _submit_and_follow(
    server: ServerFolder, settings: Mapping[str, str], path: Path, display: Display
) -> Path:
    environment = {**flower_environment(), **server.environment}
    run_id = start_run(server, settings, server.path / "submitted", environment)
    display.phase(f"run {run_id} in {path}")
    return _follow_on_server(server, run_id, path, display)


def _follow_on_server(server: ServerFolder, run_id: int, path: Path, display: Display) -> Path:
    environment = {**flower_environment(), **server.environment}
    resume = command_line("deploy", "run", str(server.path), "--resume", str(path))
    with advice(lambda: f"the run goes on on the server; follow it with: {resume}"):
        follow(
            path,
            display,
            status=lambda: run_status(run_id, environment),
            # 'deploy server' restarts a SuperLink that has exited; the run continues meanwhile.
            check=lambda: None,
        )
    return conclude(path, display, resume, server.path / "logs")


def _run_id(path: Path) -> int:
    """Flower's id of the run in progress in a run folder.

    Raises:
        UserError: the server app has not written it.
    """
    try:
        return int(json.loads((path / DEPLOYMENT).read_text())["id"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is in use by another process.") from None


def _lines(log: Path) -> list[str]:
    # The last piece is an incomplete line or empty.
    return log.read_text(errors="replace").split("\n")[:-1] if log.is_file() else []


def _first_free(stem: Path) -> Path:
    path, number = stem, 2
    while path.exists():
        path = stem.with_name(f"{stem.name}-{number}")
        number += 1
    return path
