"""Runs an experiment on Flower's simulation engine, by `flwr run` in a separate process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from fedprompt.config.schema import Config, to_yaml
from fedprompt.deploy.guard import processes_with, send_signal
from fedprompt.deploy.processes import free_port
from fedprompt.errors import UserError
from fedprompt.reports.run_data import SUMMARY, TIMINGS
from fedprompt.runtime import DEFAULTS

ROOT = Path(__file__).parents[2]
TIME_LIMIT_S = 900


def available() -> bool:
    """Whether `run_engine` works here: it needs a checkout, Flower's command and Linux."""
    command = Path(sys.executable).parent / "flwr"
    return (ROOT / "pyproject.toml").is_file() and command.is_file() and Path("/proc/self").exists()


def run_engine(config: Config, folder: Path) -> Path:
    """Run an experiment on Flower's engine, with one SuperNode per client.

    All processes that Flower started are ended afterwards.

    Args:
        config: the experiment.
        folder: where the clients' private prompts are stored (in `state`), and the run folder
            unless `output.dir` names another.

    Returns:
        The run folder.

    Raises:
        UserError: Flower did not finish the run.
        subprocess.TimeoutExpired: it took longer than `TIME_LIMIT_S`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = Path(config.output.dir or folder / "run")
    config = replace(config, output=replace(config.output, dir=str(target)))
    experiment = folder / "experiment.yaml"
    experiment.write_text(to_yaml(config), encoding="utf-8")
    federation = (
        f"num-supernodes={config.partition.clients} client-resources-num-cpus=1 "
        "client-resources-num-gpus=0"
    )
    command = ["flwr", "run", str(ROOT), "--stream", "--federation-config", federation]
    # Flower accepts texts in its run config only in TOML quotes.
    command += ["-c", f'experiment="{experiment}" overrides=""']
    with _flower_home(folder) as environment:
        finished = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIME_LIMIT_S,
            check=False,
        )
    if not (target / SUMMARY).is_file():
        output = " ".join((finished.stdout + finished.stderr).split())[-500:]
        raise UserError(f"Flower's engine did not finish the run: {output}")
    return target


def training_seconds(run: Path) -> list[float]:
    """Seconds of training in rounds 1, 2, ... of a run folder."""
    lines = [json.loads(x) for x in (run / TIMINGS).read_text().splitlines()]
    return [line["train_s"] for line in lines if line["round"] > 0]


@contextmanager
def _flower_home(folder: Path) -> Iterator[dict[str, str]]:
    """Environment variables for a Flower apart from any other on this machine.

    Its background processes have this `FLWR_HOME` in their environment, which identifies them, and
    they are ended with it.
    """
    home = str(folder / "flwr")
    environment = {
        **DEFAULTS,
        **os.environ,
        "FLWR_HOME": home,
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
        "FLWR_LOCAL_CONTROL_API_PORT": str(free_port()),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        # Otherwise Flower's Ray would join a cluster that runs on this machine, and end with it.
        "RAY_ADDRESS": "local",
        "FEDPROMPT_STATE": str(folder / "state"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    try:
        yield environment
    finally:
        # `flwr run` leaves a SuperLink and a SuperExec running, and Flower has no command that
        # stops them.
        for process in processes_with(f"FLWR_HOME={home}"):
            send_signal(process, signal.SIGKILL)
        _remove(Path(home))


def _remove(folder: Path) -> None:
    """Remove a folder, although processes that are ending may still write to it for a moment."""
    for _ in range(10):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)
