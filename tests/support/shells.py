"""`fedprompt deploy ...` as operators type it: in the background, ended by process ids."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedprompt.deploy.processes import end, processes_with


class Shell:
    """Commands with their output in files; all have ended when the context is left.

    Args:
        folder: for the output.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Shell:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        for process in self.started:
            end(process.pid, signal.SIGTERM)
        for process in self.started:
            process.wait(timeout=60)
        left = processes_with(f"FEDPROMPT_TEST={self.folder}")
        for process_id in left:
            end(process_id, signal.SIGKILL)
        if error is None:
            assert left == [], "each side ends all that it started"

    def start(
        self,
        name: str,
        *arguments: str,
        before: Sequence[str] = (),
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """`fedprompt deploy <arguments>` behind the words `before`; its output is `<name>.out`."""
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
        """As by systemd."""
        end(process.pid, signal.SIGTERM)
        process.wait(timeout=60)
        self.started.remove(process)

    def said(self, name: str) -> str:
        return (self.folder / f"{name}.out").read_text()

    def wait_for(self, name: str, words: str, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + 240
        while words not in self.said(name):
            assert process.poll() is None, self.said(name)
            assert time.monotonic() < deadline, self.said(name)
            time.sleep(0.2)
