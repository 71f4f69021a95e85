"""`fedprompt deploy local` equals the simulation on the same folders, bit for bit."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fedprompt.config.schema import to_yaml
from fedprompt.deploy.guard import processes_with
from fedprompt.experiment.display import QuietDisplay
from fedprompt.experiment.run import run as experiment
from fedprompt.reports.run_data import MEASURED, PRIVATE
from tests.support.federation_twins import private_of
from tests.support.federations import config_for, needs_processes, write_clients


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs_processes
def test_deploy_local_equals_the_simulation(tmp_path: Path) -> None:
    write_clients(tmp_path / "images")
    config = config_for(
        tmp_path / "images", tmp_path / "run", rounds=2,
        evaluation={"every": 1}, protocols=["global", "personalised"],
        training={"momentum_state": "keep"},
    )  # fmt: skip
    (tmp_path / "experiment.yaml").write_text(to_yaml(config))
    command = [sys.executable, "-m", "fedprompt", "deploy", "local"]
    command += [str(tmp_path / "experiment.yaml"), "--folder", str(tmp_path / "f")]
    mark = {"FEDPROMPT_TEST": str(tmp_path)}
    finished = subprocess.run(
        command, env={**os.environ, **mark}, capture_output=True, text=True, timeout=800
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "global" in finished.stdout
    assert processes_with(f"FEDPROMPT_TEST={tmp_path}") == []

    run = tmp_path / "run"
    twin = experiment(
        replace(config, output=replace(config.output, dir=str(tmp_path / "twin"))), QuietDisplay()
    )
    summaries = [json.loads((p / "summary.json").read_text()) for p in (run, twin)]
    for summary in summaries:  # the metadata around a message differs
        for key in (*MEASURED, "bytes_up", "bytes_down"):
            del summary[key]
    assert summaries[0] == summaries[1]
    assert summaries[0]["zero_shot"]["personal"]["clients"] == [0, 1, 2]
    ours, theirs = (
        [json.loads(x) for x in (p / "metrics.jsonl").read_text().splitlines()] for p in (run, twin)
    )
    assert len(ours) == len(theirs) == 3
    for a, b in zip(ours, theirs, strict=True):
        for part in (
            "client_steps",
            "lr",
            "train",
            "clients",
            "global",
            "personal",
            "personal_on_global",
        ):
            assert a[part] == b[part], (a["round"], part)
    shared = load_file(run / "prompts.safetensors")
    checkpoint = load_file(twin / "checkpoint.safetensors")
    for name, tensor in shared.items():
        assert tensor.numpy().tobytes() == checkpoint[name].numpy().tobytes(), name
    partitions = [json.loads((p / "partition.json").read_text()) for p in (run, twin)]
    assert partitions[0] == partitions[1]
    assert sum(map(len, partitions[0]["train_counts"])) > 0

    # Private prompts are on the nodes, equal to the simulation's, and nowhere else.
    assert not (run / PRIVATE).exists()
    for client, expected in enumerate(private_of(twin, 3)):
        files = sorted((tmp_path / "f" / f"node-{client}" / "state").rglob("round-*"))
        assert [p.name for p in files] == [
            "round-000001.safetensors",
            "round-000002.safetensors",
        ]
        assert {stat.S_IMODE(p.stat().st_mode) for p in files} == {0o600}
        stored = {n: t.numpy().tobytes() for n, t in load_file(files[-1]).items()}
        assert stored == expected
        needle = next(iter(expected.values()))[:64]
        elsewhere = [p for p in run.rglob("*") if p.is_file() and needle in p.read_bytes()]
        elsewhere += [
            p for p in (tmp_path / "f" / "server").rglob("*")
            if p.is_file() and needle in p.read_bytes()
        ]  # fmt: skip
        assert elsewhere == []
