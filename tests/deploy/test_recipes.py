"""The batch script: its syntax, and a node that ends with its job."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support import ROOT

SLURM = ROOT / "deploy" / "fedprompt-node.slurm"


def test_a_job_ends_its_node_and_hands_over_its_settings(tmp_path: Path) -> None:
    if shutil.which("bash") is None:
        pytest.skip("there is no bash")
    subprocess.run(["bash", "-n", str(SLURM)], check=True)
    program, note = tmp_path / "fedprompt", tmp_path / "note"
    # Stands for `fedprompt`: it notes how it was called and how it was ended.
    program.write_text(
        f'#!/bin/bash\necho "$@" > {note}\ntrap "echo ended >> {note}; exit 0" TERM\n'
        "while true; do sleep 0.05; done\n"
    )
    program.chmod(0o755)
    settings = {
        "FEDPROMPT_BIN": str(program),
        "FEDPROMPT_NODE": "/srv/node",
        "FEDPROMPT_DATA": "/srv/images",
        "SLURM_CPUS_PER_TASK": "3",
    }
    job = subprocess.Popen(["bash", str(SLURM)], env={**os.environ, **settings})
    try:
        deadline = time.monotonic() + 60
        while not (note.is_file() and note.read_text().endswith("\n")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        # Several times, because the script may not have set its trap yet.
        while job.poll() is None and time.monotonic() < deadline:
            job.send_signal(signal.SIGTERM)
            time.sleep(0.1)
        assert job.returncode == 0
    finally:
        job.kill()
    assert note.read_text().split("\n")[0] == (
        "deploy node /srv/node --data /srv/images --threads 3"
    )
    assert "ended" in note.read_text()
