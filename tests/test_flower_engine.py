"""Flower's own simulation engine, through `flwr run`, gives the numbers of our inline grid."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import small_config
from fedprompt.config import Config, to_yaml
from fedprompt.display import QuietDisplay
from fedprompt.experiment import run
from fedprompt.private_log import PrivateLog
from fedprompt.run_folder import CHECKPOINT, PRIVATE, read_checkpoint

ROOT = Path(__file__).parent.parent
CLIENTS = 3


def config_for(folder: Path) -> Config:
    config = small_config(
        data={"images_per_class": 8, "domains": ["savanna"]},
        partition={"clients": CLIENTS, "alpha": 1.0},
        federation={"rounds": 2},
        grid={"threads": 1, "cohort_size": 1},
        output={"report": True},
    )
    return replace(config, output=replace(config.output, dir=str(folder)))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def flower_home(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An environment of its own for Flower; its background processes are ended by pid."""
    environment = {
        **os.environ,
        "FLWR_HOME": str(tmp_path / "flwr"),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
        "FLWR_LOCAL_CONTROL_API_PORT": str(free_port()),
        "FEDPROMPT_STATE": str(tmp_path / "state"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    yield environment
    for process in processes_of(environment["FLWR_HOME"]):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def processes_of(flower_home: str) -> list[int]:
    """Processes that were started with this FLWR_HOME, and none else."""
    wanted = f"FLWR_HOME={flower_home}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds Flower's processes through /proc")
def test_flwr_run_equals_inline(tmp_path: Path, flower_home: dict[str, str]) -> None:
    inline = run(config_for(tmp_path / "inline"), QuietDisplay())
    (tmp_path / "experiment.yaml").write_text(to_yaml(config_for(tmp_path / "engine")))
    finished = subprocess.run(
        [
            "flwr", "run", str(ROOT), "--stream",
            "--federation-config",
            f"num-supernodes={CLIENTS} client-resources-num-cpus=1 client-resources-num-gpus=0",
            "-c", f'experiment="{tmp_path / "experiment.yaml"}" overrides=""',
        ],
        env=flower_home, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    engine = tmp_path / "engine"
    assert (engine / "report.html").is_file(), (finished.stdout + finished.stderr)[-3000:]
    ours, theirs = (load_file(f / "prompts.safetensors") for f in (inline, engine))
    assert torch.equal(ours["shared/ctx"], theirs["shared/ctx"])
    lines = [
        [json.loads(x) for x in (f / "metrics.jsonl").read_text().splitlines()]
        for f in (inline, engine)
    ]
    for a, b in zip(*lines, strict=True):
        for part in ("lr", "train", "clients", "global", "personal", "personal_on_global"):
            assert a[part] == b[part], (a["round"], part)
    # Private prompts stay with the clients: files on their side, none in the server's folder.
    assert [k for k in theirs if not k.startswith("shared/")] == []
    assert not (engine / PRIVATE).exists()
    checkpoint = read_checkpoint(inline / CHECKPOINT)
    private = PrivateLog(inline / PRIVATE, CLIENTS)
    private.read(checkpoint.server_round, checkpoint.private)
    kept = sorted((tmp_path / "state").rglob("*.safetensors"))
    assert {p.parent.name for p in kept} == {f"client-{k:05d}" for k in range(CLIENTS)}
    assert all(p.stat().st_mode & 0o777 == 0o600 for p in kept)
    for k in range(CLIENTS):
        last = max(p for p in kept if p.parent.name == f"client-{k:05d}")
        own = private.get(k)
        assert own is not None
        assert torch.equal(load_file(last)["ctx"], own["ctx"])
