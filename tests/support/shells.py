"""Runs `fedprompt deploy ...` in the background, as administrators type it in a shell."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedprompt.deploy.guard import processes_with, send_signal


class Shell:
    """Commands whose output goes to files; leaving the context ends them by their process ids.

    Args:
        folder: for the output files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Shell:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        for process in self.started:
            send_signal(process.pid, signal.SIGTERM)
        for process in self.started:
            process.wait(timeout=60)
        remaining = processes_with(f"FEDPROMPT_TEST={self.folder}")
        for process_id in remaining:
            send_signal(process_id, signal.SIGKILL)
        if error is None:
            assert remaining == [], "every command ends all processes that it has started"

    def start(
        self,
        name: str,
        *arguments: str,
        before: Sequence[str] = (),
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start `fedprompt deploy <arguments>`.

        Args:
            name: its output goes to `<name>.out`.
            arguments: what follows `fedprompt deploy`.
            before: words before the command, for example to run it in a network namespace.
            cwd: its working folder.
            environment: variables beyond this process's own.
        """
        with (self.folder / f"{name}.out").open("wb") as out:
            process = subprocess.Popen(
                [*before, sys.executable, "-m", "fedprompt", "deploy", *arguments],
                env={**os.environ, **(environment or {}), "FEDPROMPT_TEST": str(self.folder)},
                cwd=cwd,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        self.started.append(process)
        return process

    def stop(self, process: subprocess.Popen[bytes]) -> None:
        """End a command as systemd does."""
        send_signal(process.pid, signal.SIGTERM)
        process.wait(timeout=60)
        self.started.remove(process)

    def output(self, name: str) -> str:
        """What a command has printed so far."""
        return (self.folder / f"{name}.out").read_text()

    def wait_for(self, name: str, words: str, process: subprocess.Popen[bytes]) -> None:
        """Wait until a command that is still running has printed these words."""
        deadline = time.monotonic() + 240
        while words not in self.output(name):
            assert process.poll() is None, self.output(name)
            assert time.monotonic() < deadline, self.output(name)
            time.sleep(0.2)
