from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprompt.config.fields import build
from fedprompt.config.protection import AttackConfig
from fedprompt.experiment.compose import compose
from fedprompt.experiment.display import make_display
from fedprompt.experiment.run import run
from fedprompt.experiment.workspaces import open_workspace
from fedprompt.federation import client_app
from fedprompt.federation.screening import Update
from fedprompt.federation.server_app import Federation
from fedprompt.federation.strategy import SharedPromptStrategy
from fedprompt.simulation import attacks
from fedprompt.simulation.attacks import GIANT, MANY, SPOILED, attackers
from fedprompt.simulation.grids import open_grid
from fedprompt.simulation.inline_grid import InlineGrid
from fedprompt.workspace import Workspace

MakeWorkspace = Callable[..., Workspace]
SECTIONS: dict[str, Any] = {
    "method": {"name": "promptfl", "context_tokens": 2},
    "partition": {"clients": 4, "scheme": "iid"},
    "simulation": {"clients_per_block": 1, "threads": 1},
}


def attacked(make_workspace: MakeWorkspace, kind: str, **attack: Any) -> Workspace:
    return make_workspace(**SECTIONS, attack={"kind": kind, "share": 0.5, **attack})


def first_round(workspace: Workspace) -> tuple[Any, list[Update], dict[int, str], dict[str, Any]]:
    """What was sent, the accepted updates and the refused ones of round 1, and its line."""
    federation = Federation(workspace, open_grid(workspace.config, workspace, open_workspace))
    federation.join()
    sent = federation.shared["ctx"].numpy()
    seen: list[Update] = []
    strategy: SharedPromptStrategy = federation.strategy
    aggregate = strategy.aggregate

    def watched(server_round: int, shared: Any, updates: list[Update]) -> Any:
        seen.extend(updates)
        return aggregate(server_round, shared, updates)

    strategy.aggregate = watched  # type: ignore[method-assign]
    line = federation.train_round(1)
    return sent, seen, strategy.rejected, line


def changes(workspace: Workspace) -> dict[int, Any]:
    sent, updates, rejected, _ = first_round(workspace)
    assert not rejected
    return {u.client: u.arrays["ctx"].astype(np.float64) - sent for u in updates}


def test_every_kind_of_the_schema_is_known() -> None:
    for kind in (*SPOILED, "none"):
        assert build(AttackConfig, {"kind": kind}, "attack").kind == kind


def test_attackers_are_a_fixed_share_drawn_from_the_seed() -> None:
    assert attackers(1, range(10), 0.3) == attackers(1, range(10), 0.3)
    assert {len(attackers(s, range(10), 0.3)) for s in range(20)} == {3}
    assert len({attackers(s, range(10), 0.3) for s in range(20)}) > 10
    assert attackers(1, range(10), 0.0) == frozenset()
    assert attackers(1, range(3), 1.0) == {0, 1, 2}
    # A golden draw: results of former runs with attackers can be repeated.
    assert sorted(attackers(1, range(10), 0.3)) == [4, 8, 9]


@pytest.mark.parametrize("kind", ["late_clients", "unlabelled_clients"])
def test_attackers_are_among_those_that_train(make_workspace: MakeWorkspace, kind: str) -> None:
    """Every client that joins late, or has no labels, would be an attacker that never attacks."""
    partition = {**SECTIONS["partition"], kind: 2}
    attack = {"kind": "sign_flip", "share": 1.0}
    workspace = make_workspace(**{**SECTIONS, "partition": partition}, attack=attack)
    idle = workspace.late | workspace.partition.unlabelled
    assert len(idle) == 2
    assert workspace.possible_attackers == sorted({0, 1, 2, 3} - idle)
    federation = Federation(workspace, open_grid(workspace.config, workspace, open_workspace))
    federation.join()
    assert federation.train_round(1)["clients"]["accepted"] == 2


def test_attackers_stay_when_a_client_s_images_are_left_out(make_workspace: MakeWorkspace) -> None:
    workspace = attacked(make_workspace, "sign_flip")
    empty = np.zeros(0, dtype=np.int64)
    rest = workspace.partition.trained_on([empty, *map(workspace.partition.train, (1, 2, 3))])
    other = workspace.with_partition(rest)
    assert other.trainable == [1, 2, 3]
    assert other.possible_attackers == workspace.possible_attackers == [0, 1, 2, 3]


def test_nobody_attacks_unless_asked(make_workspace: MakeWorkspace) -> None:
    workspace = make_workspace(**SECTIONS)
    grid = open_grid(workspace.config, workspace, open_workspace)
    assert grid.answer is client_app.handle
    attacking = attacked(make_workspace, "scaling")
    assert open_grid(attacking.config, attacking, open_workspace).answer is attacks.handle


@pytest.mark.parametrize(("kind", "factor"), [("sign_flip", -3.0), ("scaling", 3.0)])
def test_scaled_changes(make_workspace: MakeWorkspace, kind: str, factor: float) -> None:
    honest = changes(make_workspace(**SECTIONS))
    found = changes(attacked(make_workspace, kind, scale=3.0))
    bad = attackers(1, range(4), 0.5)
    for client, change in honest.items():
        expected = factor * change if client in bad else change
        np.testing.assert_allclose(found[client], expected, rtol=1e-4, atol=1e-7)
        assert np.abs(change).max() > 1e-5, "training does something here"


def test_random_noise_has_the_asked_norm(make_workspace: MakeWorkspace) -> None:
    honest = changes(make_workspace(**SECTIONS))
    found = changes(attacked(make_workspace, "random_noise", scale=2.0))
    for client in attackers(1, range(4), 0.5):
        ratio = np.linalg.norm(found[client]) / np.linalg.norm(honest[client])
        assert ratio == pytest.approx(2.0, rel=1e-4)
        cosine = (found[client] * honest[client]).sum() / ratio
        assert abs(cosine) < 0.5 * np.linalg.norm(honest[client]) ** 2
    again = changes(attacked(make_workspace, "random_noise", scale=2.0))
    assert all((again[c] == found[c]).all() for c in found), "keyed by the seed"


def test_label_flip_trains_on_the_other_labels(make_workspace: MakeWorkspace) -> None:
    honest = changes(make_workspace(**SECTIONS))
    workspace = attacked(make_workspace, "label_flip")
    labels_N = workspace.dataset.labels_N.copy()
    found = changes(workspace)
    assert (workspace.dataset.labels_N == labels_N).all(), "evaluation sees the true labels"
    flipped = make_workspace(**SECTIONS)
    object.__setattr__(flipped.dataset, "labels_N", 5 - labels_N)
    try:
        wrong = changes(flipped)
    finally:
        object.__setattr__(flipped.dataset, "labels_N", labels_N)
    for client, change in honest.items():
        expected = wrong[client] if client in attackers(1, range(4), 0.5) else change
        np.testing.assert_allclose(found[client], expected, rtol=1e-5, atol=1e-8)
        assert not np.allclose(wrong[client], change)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("nan", "not finite"),
        ("inf", "not finite"),
        ("wrong_name", "['ctx_'] instead of ['ctx']"),
        ("wrong_shape", "float32 (1, 2, 64), not float32 (2, 64)"),
        ("wrong_type", "float64 (2, 64), not float32"),
        ("giant", f"float32 ({GIANT},), not float32 (2, 64)"),
        ("many_examples", f"num-examples is {MANY}, above max_examples_ratio=1000 times"),
        ("crash", "Crashed: this client has crashed"),
    ],
)
def test_broken_clients_are_dropped_counted_and_named(
    make_workspace: MakeWorkspace, kind: str, reason: str
) -> None:
    bad = attackers(1, range(4), 0.5)
    _, updates, rejected, line = first_round(attacked(make_workspace, kind))
    assert {u.client for u in updates} == set(range(4)) - bad
    assert set(rejected) == bad
    assert line["clients"] == {"sampled": 4, "accepted": 2, "rejected": 2}
    assert set(line["dropped"]) == {str(c) for c in bad}
    assert all(reason in text for text in line["dropped"].values())
    honest = {u.client: u for u in first_round(make_workspace(**SECTIONS))[1]}
    for update in updates:
        assert (update.arrays["ctx"] == honest[update.client].arrays["ctx"]).all()


def test_attackers_are_tested_like_others(make_workspace: MakeWorkspace) -> None:
    lines = []
    for workspace in (make_workspace(**SECTIONS), attacked(make_workspace, "nan")):
        federation = Federation(workspace, InlineGrid(workspace, answer=attacks.handle))
        federation.join()
        lines.append(federation.evaluate(0))
    assert lines[0] == lines[1]


def test_a_run_names_who_was_dropped(run_config: Callable[..., Any]) -> None:
    config = run_config(**SECTIONS, attack={"kind": "nan", "share": 0.25})
    folder = run(config, make_display())
    rounds = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    (bad,) = attackers(1, range(4), 0.25)
    assert [list(x.get("dropped", {})) for x in rounds] == [[], *[[str(bad)]] * 3]
    assert json.loads((folder / "summary.json").read_text())["rejected_replies"] == 3


def accuracy(tmp_path: Path, name: str, *overrides: str) -> float:
    folder = tmp_path / name
    config = compose(
        "attack_sign_flip",
        [*overrides, "evaluation.every=30", "output.report=false", f"output.dir={folder}"],
    )
    run(config, make_display())
    return float(json.loads((folder / "summary.json").read_text())["global"]["accuracy"])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_robust_strategies_hold_where_fedavg_breaks(tmp_path: Path) -> None:
    clean = accuracy(tmp_path, "clean", "attack.kind=none")
    assert accuracy(tmp_path, "fedavg") < clean - 0.3
    for rule in ("multi_krum", "trimmed_mean", "median", "krum"):
        assert accuracy(tmp_path, rule, f"strategy={rule}") > clean - 0.03, rule
