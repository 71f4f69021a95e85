"""Flower's simulation engine, through `flwr run`, gives the results of our inline grid."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ray.cluster_utils import Cluster
from safetensors.torch import load_file

from fedprompt.bench.flower_engine import available, run_engine
from fedprompt.config.schema import Config
from fedprompt.experiment.checkpoint import read_checkpoint
from fedprompt.experiment.display import QuietDisplay
from fedprompt.experiment.run import run
from fedprompt.reports.run_data import CHECKPOINT, PRIVATE
from fedprompt.simulation.private_log import PrivateLog
from tests.support.builders import small_config

CLIENTS = 3


def config_for(folder: Path) -> Config:
    config = small_config(
        data={"images_per_class": 8, "domains": ["savanna"]},
        partition={"clients": CLIENTS, "alpha": 1.0},
        federation={"rounds": 2},
        simulation={"threads": 1, "clients_per_block": 1},
        output={"report": True},
        protocols=["global", "personalised", "base_to_new", "calibration"],
    )
    return replace(config, output=replace(config.output, dir=str(folder)))


@pytest.mark.slow
@pytest.mark.skipif(not available(), reason="needs a checkout, Flower's command and /proc")
def test_flwr_run_equals_inline(tmp_path: Path) -> None:
    inline = run(config_for(tmp_path / "inline"), QuietDisplay())
    # The engine must start a Ray of its own: this cluster has no CPU, so no client could run on it.
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        engine = run_engine(config_for(tmp_path / "engine"), tmp_path)
    finally:
        cluster.shutdown()
    assert (engine / "report.html").is_file()
    ours, theirs = (load_file(f / "prompts.safetensors") for f in (inline, engine))
    assert torch.equal(ours["shared/ctx"], theirs["shared/ctx"])
    lines = [
        [json.loads(x) for x in (f / "metrics.jsonl").read_text().splitlines()]
        for f in (inline, engine)
    ]
    for a, b in zip(*lines, strict=True):
        for part in ("lr", "train", "clients", "global", "personal", "personal_on_global"):
            assert a[part] == b[part], (a["round"], part)
    ends = [json.loads((f / "summary.json").read_text())["protocols"] for f in (inline, engine)]
    assert ends[0] == ends[1]
    assert [row["model"] for row in ends[0]["base_to_new"]["rows"]][-1] == "personal"
    # Private prompts stay with the clients: files on their side, none in the server's folder.
    assert [k for k in theirs if not k.startswith("shared/")] == []
    assert not (engine / PRIVATE).exists()
    checkpoint = read_checkpoint(inline / CHECKPOINT)
    private = PrivateLog(inline / PRIVATE, CLIENTS)
    private.read(checkpoint.server_round, checkpoint.private)
    stored = sorted((tmp_path / "state").rglob("*.safetensors"))
    assert {p.parent.name for p in stored} == {f"client-{k:05d}" for k in range(CLIENTS)}
    assert all(p.stat().st_mode & 0o777 == 0o600 for p in stored)
    for k in range(CLIENTS):
        last = max(p for p in stored if p.parent.name == f"client-{k:05d}")
        tensors = private.get(k)
        assert tensors is not None
        assert torch.equal(load_file(last)["ctx"], tensors["ctx"])
