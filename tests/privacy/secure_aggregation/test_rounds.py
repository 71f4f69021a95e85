"""Whole rounds and runs: the result of the plain exchange within the derived bound."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message

import fedprompt.federation.client_app as client_app
from fedprompt.config.schema import Config, to_yaml
from fedprompt.errors import UserError
from fedprompt.experiment.display import QuietDisplay
from fedprompt.experiment.run import resume, run
from fedprompt.federation.server_app import Federation
from fedprompt.messages import to_wire
from fedprompt.privacy.secure_aggregation import (
    COLLECT,
    RECORD,
    SHARE_KEYS,
    UNMASK,
    flower,
    stage_of,
)
from fedprompt.privacy.secure_aggregation.params import Terms
from fedprompt.privacy.secure_aggregation.vector import LARGEST_LOSS
from fedprompt.simulation.inline_grid import InlineGrid
from tests.support.builders import small_config
from tests.support.grids import private_tensors
from tests.support.secure_rounds import (
    ON,
    PROMPTFL,
    STAGES,
    MakeWorkspace,
    bound_for,
    error_bound,
    fedavg_of,
    federation_of,
    is_from,
    make_plain,
    one_round,
    values,
)

# The result


@pytest.mark.parametrize(
    "strategy",
    [
        {"name": "fedavg"},
        {"name": "fedavg", "weights": "uniform"},
        {"name": "fedavgm", "lr": 1.0},
        {"name": "gaussian"},
    ],
    ids=lambda s: "-".join(map(str, s.values())),
)
def test_the_result_is_the_plain_one_within_the_bound(
    make_workspace: MakeWorkspace, strategy: dict[str, Any]
) -> None:
    masked = make_workspace(method=PROMPTFL, strategy=strategy, secure_aggregation=ON)
    plain = make_plain(masked)
    (theirs, line), (ours, secure) = one_round(plain), one_round(masked)
    start = federation_of(plain)[0]
    bound = bound_for(masked, 4)
    assert np.abs(theirs - values(start)).max() > 1000 * bound, "training moves the prompts"
    assert np.abs(ours - theirs).max() <= bound
    if strategy == {"name": "fedavg"}:
        assert np.abs(secure["train"]["loss"] - line["train"]["loss"]) <= LARGEST_LOSS * bound
    assert secure["clients"] == line["clients"] == {"sampled": 4, "accepted": 4, "rejected": 0}
    assert secure["secure"] == {"clipped": 0}
    assert set(secure["train"]) == {"loss"}


@pytest.mark.parametrize("name", ["fedadam", "fedyogi"])
def test_adaptive_rules_take_the_mean(make_workspace: MakeWorkspace, name: str) -> None:
    masked = make_workspace(method=PROMPTFL, strategy={"name": name}, secure_aggregation=ON)
    settings = masked.config.strategy
    # A step is lr (1 - beta_1) Delta / (sqrt(v) + tau) with sqrt(v) >= sqrt(beta_2) tau, and its
    # slope in Delta is at most lr (1 - beta_1) / (sqrt(beta_2) tau + tau).
    slope = settings.lr * (1 - settings.beta_1) / (settings.tau * (1 + settings.beta_2**0.5))
    gap = np.abs(one_round(masked)[0] - one_round(make_plain(masked))[0]).max()
    assert gap <= bound_for(masked, 4) * max(1.0, slope)


def test_two_runs_end_in_the_same_bits(make_workspace: MakeWorkspace) -> None:
    outcomes = []
    for _ in range(2):
        federation, _ = federation_of(make_workspace(method=PROMPTFL, secure_aggregation=ON))
        lines = [federation.train_round(r) for r in (1, 2)]
        outcomes.append((values(federation).tobytes(), lines))
    assert outcomes[0] == outcomes[1]


def test_private_prompts_are_those_of_the_plain_run(make_workspace: MakeWorkspace) -> None:
    masked = make_workspace(secure_aggregation=ON)
    kept = []
    for workspace in (masked, make_plain(masked)):
        federation, grid = federation_of(workspace)
        federation.train_round(1)
        kept.append(private_tensors(grid))
    assert kept[0].keys() == kept[1].keys() != set()
    assert all((kept[0][n] == kept[1][n]).all() for n in kept[0])


def test_peers_on_a_circle(make_workspace: MakeWorkspace) -> None:
    settings = {**ON, "shares": 5}
    workspace = make_workspace(
        method=PROMPTFL, partition={"clients": 9}, secure_aggregation=settings
    )
    federation, grid = federation_of(workspace)
    lost = 4
    grid.spoil = lambda stage, m: None if stage == COLLECT and is_from(lost, m) else m
    line = federation.train_round(1)
    counted = [c for c in range(9) if c != lost]
    gap = np.abs(values(federation) - fedavg_of(workspace, counted)).max()
    assert gap <= bound_for(workspace, 9, counted)
    assert line["clients"]["accepted"] == 8
    asked = [m for m in grid.sent if stage_of(m) == SHARE_KEYS]
    assert {len(m.content.config_records[RECORD]) - 1 for m in asked} == {5}


def test_bytes_of_all_four_exchanges_are_counted(make_workspace: MakeWorkspace) -> None:
    federation, grid = federation_of(make_workspace(method=PROMPTFL, secure_aggregation=ON))
    line = federation.train_round(1)
    assert [stage_of(m) for m in grid.sent] == [s for s in STAGES for _ in range(4)]
    # The grid's own copies carry message ids, which the server's do not yet have.
    down = sum(len(to_wire(m)) for m in grid.sent)
    assert down <= line["bytes_down"] <= down + 40 * len(grid.sent)
    assert line["bytes_up"] == sum(len(to_wire(m)) for m in grid.got)


# Clip, weights, noise


def test_a_change_beyond_the_clip_is_cut_and_counted(
    make_workspace: MakeWorkspace, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {**ON, "clip": 1e-4}
    workspace = make_workspace(method=PROMPTFL, secure_aggregation=settings)
    federation, _ = federation_of(workspace)
    start = values(federation)
    with caplog.at_level(logging.WARNING, "fedprompt"):
        line = federation.train_round(1)
    assert line["secure"] == {"clipped": 4}
    assert "of 4 of 4 clients were larger than secure_aggregation.clip=0.0001" in caplog.text
    step = np.abs(values(federation) - start).max()
    assert step == pytest.approx(1e-4, rel=1e-3)


def test_a_client_that_has_diverged_is_named(
    make_workspace: MakeWorkspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_clients = client_app.train_clients

    def diverging(*arguments: Any, **settings: Any) -> Any:
        return [
            replace(r, shared={n: t * torch.nan for n, t in r.shared.items()})
            if r.client == 2
            else r
            for r in train_clients(*arguments, **settings)
        ]

    monkeypatch.setattr(client_app, "train_clients", diverging)
    federation, _ = federation_of(make_workspace(method=PROMPTFL, secure_aggregation=ON))
    line = federation.train_round(1)
    assert list(line["diverged"]) == list(line["dropped"]) == ["2"]
    assert line["clients"]["accepted"] == 3


def test_more_images_than_a_weight_can_say(make_workspace: MakeWorkspace) -> None:
    settings = {"enabled": True, "max_weight": 5}
    workspace = make_workspace(method=PROMPTFL, secure_aggregation=settings)
    with pytest.raises(UserError, match=r"more than secure_aggregation\.max_weight=5; raise it"):
        Federation(workspace, InlineGrid(workspace))
    alike = make_workspace(
        method=PROMPTFL,
        secure_aggregation=settings,
        strategy={"name": "fedavg", "weights": "uniform"},
    )
    assert one_round(alike)[1]["clients"]["accepted"] == 4


def test_noise_goes_into_the_sum(
    make_workspace: MakeWorkspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "fedprompt.federation.server_app.local_epsilon", lambda config, rounds: None
    )
    privacy = {"noise": 0.1, "clip": 0.1, "noise_seed": 3}
    masked = make_workspace(method=PROMPTFL, secure_aggregation=ON, privacy=privacy)
    (ours, line), (theirs, plain) = one_round(masked), one_round(make_plain(masked))
    levels = Terms.of(masked.config.secure_aggregation, 4).levels
    assert np.abs(ours - theirs).max() <= error_bound(1.0, levels, 1.0) + np.finfo(np.float32).eps
    assert line["train"] is plain["train"] is None, "no losses"
    quiet = make_workspace(method=PROMPTFL, secure_aggregation=ON)
    assert np.abs(ours - one_round(quiet)[0]).max() > 1e-3, "there is noise"


# Config


ONE_LINE: dict[str, tuple[dict[str, Any], str]] = {
    "rule": ({"strategy": {"name": "krum"}}, "strategy 'krum' looks at single replies"),
    "central noise": ({"strategy": {"name": "dp_fedavg"}}, "'dp_fedavg' looks at single replies"),
    "subclass": ({"strategy": {"name": "nearest_peers"}}, "'nearest_peers' looks at single"),
    "scaffold": ({"strategy": {"name": "scaffold"}}, "'scaffold' looks at single replies"),
    "per class": ({"strategy": {"name": "per_class"}}, "'per_class' looks at single replies"),
    "attack": ({"attack": {"kind": "nan"}}, "attack.kind=nan is caught by checks of single"),
    "two": ({"partition": {"clients": 2}}, "needs 3 clients in a round"),
    "few": ({"federation": {"fraction": 0.3}}, "needs 3 clients in a round"),
    "half": ({"secure_aggregation": {"threshold": 0.5}}, "threshold"),
    "even": ({"secure_aggregation": {"shares": 4}}, "it must be odd and at least 3"),
    "name": ({"secure_aggregation": {"shards": 3}}, "Did you mean"),
}


@pytest.mark.parametrize("case", ONE_LINE)
def test_what_cannot_be_is_one_line(case: str) -> None:
    sections, reason = ONE_LINE[case]
    sections = {**sections, "secure_aggregation": {**ON, **sections.get("secure_aggregation", {})}}
    with pytest.raises(UserError) as refused:
        small_config(**sections)
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_flower_without_it_is_one_line(
    make_workspace: MakeWorkspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = make_workspace(method=PROMPTFL, secure_aggregation=ON)
    monkeypatch.setattr(flower, "_missing", ImportError("no SecAgg+"))
    with pytest.raises(UserError, match="no SecAgg"):
        Federation(workspace, InlineGrid(workspace))


# Everything that uses secure aggregation is importable without Flower's private modules.
WITHOUT = """
import sys
import flwr
sys.modules["flwr.client.mod"] = None
import fedprompt.deploy.node, fedprompt.experiment.run
from fedprompt.errors import UserError
from fedprompt.privacy.secure_aggregation import require_flower
try:
    require_flower()
except UserError as error:
    print(error)
"""


def test_a_flower_without_it_serves_everything_else() -> None:
    result = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "secure_aggregation.enabled=false" in result.stdout


# Runs


def config_for(folder: Path, **sections: Any) -> Config:
    config = small_config(
        data={"images_per_class": 8, "domains": ["savanna"]},
        partition={"clients": 4, "alpha": 1.0},
        secure_aggregation=ON,
        **{"evaluation": {"every": 100, "local_only": False}, **sections},
    )
    return replace(config, output=replace(config.output, dir=str(folder)))


# Kills itself in the middle of round 2, when all clients have trained and nothing is unmasked.
KILLER = """
import os, signal, sys
from fedprompt.cli.main import app
from fedprompt.privacy.secure_aggregation import server
unmask, calls = server._Round._unmask, []
def lethal(self, *who):
    calls.append(0)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return unmask(self, *who)
server._Round._unmask = lethal
app(["run", sys.argv[1], "--quiet"])
"""


def test_a_round_that_is_repeated_begins_with_new_keys(make_workspace: MakeWorkspace) -> None:
    workspace = make_workspace(method=PROMPTFL, secure_aggregation=ON)
    unbroken, _ = federation_of(workspace)
    expected = [unbroken.train_round(r) for r in (1, 2)]
    federation, grid = federation_of(workspace)
    federation.train_round(1)
    checkpoint = federation.checkpoint(1, {"rejected": 0})

    def interrupt(stage: str | None, message: Message) -> Message:
        if stage == UNMASK:
            raise KeyboardInterrupt
        return message

    grid.tamper = interrupt
    with pytest.raises(KeyboardInterrupt):
        federation.train_round(2)
    assert all(grid._secrets.values()), "all clients wait in the middle of the protocol"
    grid.tamper = lambda stage, m: m
    federation.restore(checkpoint)
    assert federation.train_round(2) == expected[1]
    assert values(federation).tobytes() == values(unbroken).tobytes()


@pytest.mark.slow
def test_kill_and_resume_in_the_middle_of_the_protocol(tmp_path: Path) -> None:
    unbroken = run(config_for(tmp_path / "unbroken"), QuietDisplay())
    folder = tmp_path / "run"
    (tmp_path / "experiment.yaml").write_text(to_yaml(config_for(folder)))
    command = [sys.executable, "-c", KILLER, str(tmp_path / "experiment.yaml")]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    assert b"PRIVATE KEY" not in b"".join(p.read_bytes() for p in folder.rglob("*") if p.is_file())
    resume(folder, QuietDisplay())
    for name in ("prompts.safetensors", "metrics.jsonl"):
        assert (folder / name).read_bytes() == (unbroken / name).read_bytes(), name


@pytest.mark.slow
def test_ray_ends_in_the_bits_of_the_inline_grid(tmp_path: Path) -> None:
    """With the local-only baseline behind it, which is in the clear: nothing is shared there."""
    grid, evaluation = {"threads": 1, "clients_per_block": 1}, {"every": 100, "local_only": True}

    def ended(name: str, **more: Any) -> Path:
        config = config_for(tmp_path / name, simulation={**grid, **more}, evaluation=evaluation)
        return run(config, QuietDisplay())

    inline, ray = ended("inline"), ended("ray", kind="ray", workers=2)
    for name in ("prompts.safetensors", "metrics.jsonl"):
        assert (ray / name).read_bytes() == (inline / name).read_bytes(), name
