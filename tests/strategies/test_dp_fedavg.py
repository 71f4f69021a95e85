"""DP-FedAvg: clipping, noise, and the epsilon that they cost."""

from __future__ import annotations

import json
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprompt.errors import UserError
from fedprompt.experiment.display import make_display
from fedprompt.experiment.run import run
from fedprompt.experiment.run_folder import RunFolder
from fedprompt.federation.server_app import Federation
from fedprompt.privacy.accountant import epsilon
from fedprompt.reports.run_data import CHECKPOINT
from fedprompt.simulation.inline_grid import InlineGrid
from fedprompt.strategies.dp_fedavg import DPFedAvg
from tests.support.strategies import (
    answer,
    make_strategy,
    random_rows,
    send,
    shared_after,
    step,
    strategy_of_clients,
    updates_of,
)


def dp(clients: int = 4, numbers: int = 4, **options: Any) -> DPFedAvg:
    pytest.importorskip("dp_accounting", reason="needs the extra 'dp'")
    strategy = make_strategy("dp_fedavg", (numbers,), clients, **options)
    assert isinstance(strategy, DPFedAvg)
    return strategy


def test_dp_clips_counts_clients_alike_and_divides_by_those_asked() -> None:
    strategy = dp(noise=0.0, clip=1.0)
    strategy.sampled = [0, 1, 2, 3]
    rows = [[3.0, 4.0, 0, 0], [0, 0, 0.5, 0], [0, 0, 0, -9.0]]
    after = strategy.aggregate(1, {"ctx": np.zeros(4, np.float32)}, updates_of(rows, [1, 900, 7]))
    np.testing.assert_allclose(after["ctx"], np.array([0.6, 0.8, 0.5, -1.0]) / 4, rtol=1e-6)
    assert strategy.metrics()["epsilon"] is None
    assert strategy.metrics()["clipped_share"] == pytest.approx(2 / 3)


def test_one_client_moves_the_sum_by_at_most_the_bound() -> None:
    rows = 50 * random_rows(6, 4)
    start = {"ctx": np.zeros(4, np.float32)}
    full_sum, without = dp(6, noise=0.0, clip=0.7), dp(6, noise=0.0, clip=0.7)
    full_sum.sampled = without.sampled = list(range(6))
    one = full_sum.aggregate(1, start, updates_of(rows))["ctx"]
    two = without.aggregate(1, start, updates_of(rows)[:-1])["ctx"]
    assert np.linalg.norm(6.0 * (one - two)) <= 0.7 + 1e-6


@pytest.mark.parametrize("claims", [[1] * 11 + [5000] * 11, [10**9] + [1] * 21])
def test_one_client_moves_the_sum_by_at_most_the_bound_whatever_it_claims(
    claims: list[int],
) -> None:
    def total(without: int | None) -> float:
        strategy = dp(len(claims), noise=0.0, clip=1.0)
        messages = send(strategy, {"ctx": np.zeros(4, np.float32)})
        row = np.array([5.0, 0, 0, 0], np.float32)
        replies = [
            answer(m, {"ctx": row}, claims[k]) for k, m in enumerate(messages) if k != without
        ]
        after = shared_after(strategy, replies)
        assert after is not None
        return len(claims) * float(after["ctx"][0])

    everyone = total(None)
    assert all(abs(everyone - total(k)) <= 1 + 1e-5 for k in (0, 11, 21))


def test_noise_is_sent_whether_or_not_anybody_replies() -> None:
    strategy, start = dp(4, noise=2.0), {"ctx": np.zeros(4, np.float32)}
    send(strategy, start)
    after = shared_after(strategy, [])
    assert after is not None
    assert (after["ctx"] != 0).all()
    assert strategy.epsilon == epsilon(2.0, 1, 1e-5)
    with pytest.raises(UserError, match=r"min_replies=1"):
        strategy_of_clients(4, "dp_fedavg", min_replies=2)


def test_dp_noise_has_the_stated_size() -> None:
    numbers = 100_000
    strategy = dp(5, numbers, noise=2.0, clip=0.3)
    after = step(strategy, np.zeros((5, numbers)))
    assert after.std() == pytest.approx(2.0 * 0.3 / 5, rel=0.02)
    assert abs(after.mean()) < 0.002


def test_dp_noise_is_secret_and_fresh() -> None:
    rows = np.zeros((4, 4))
    assert (step(dp(), rows) != step(dp(), rows)).all(), "another run, other noise"
    fixed = [step(dp(noise_seed=1), rows) for _ in range(2)]
    assert (fixed[0] == fixed[1]).all()
    resumed, strategy = dp(), dp()
    resumed.load_state(strategy.state())
    other = rows + 1e-3
    assert (step(strategy, rows) == step(resumed, rows)).all()
    once, again = dp(), dp()
    again.load_state(once.state())
    # The same round with other replies: were the noise the same, it would cancel out.
    difference = step(once, rows) - step(again, other)
    assert np.abs(difference + 1e-3).max() > 1e-2


def test_epsilon_counts_the_rounds_in_which_a_client_was_asked() -> None:
    strategy = dp(4, noise=2.0)
    start, rows = {"ctx": np.zeros(4, np.float32)}, updates_of(np.zeros((4, 4)))
    for server_round, asked in enumerate(([0, 1], [2, 3], [0, 2]), 1):
        strategy.sampled = asked
        strategy.aggregate(server_round, start, [rows[c] for c in asked])
    assert strategy.metrics()["releases"] == 2
    assert strategy.epsilon == epsilon(2.0, 2, 1e-5)


def test_a_round_that_is_repeated_with_other_replies_is_paid_for_twice() -> None:
    strategy = dp(4, noise=2.0)
    step(strategy, np.zeros((4, 4)))
    state = strategy.state()
    rows = random_rows(4, 4)
    for replies in (rows, rows, rows[:3]):  # released, the same once more, and one is missing
        strategy.load_state(state)
        strategy.sampled = [0, 1, 2, 3]
        strategy.aggregate(2, {"ctx": np.zeros(4, np.float32)}, updates_of(replies))
        paid = 3 if len(replies) == 3 else 2
        assert strategy.metrics()["releases"] == paid
        assert strategy.epsilon == epsilon(2.0, paid, 1e-5)


def test_a_spent_budget_ends_the_training() -> None:
    pytest.importorskip("dp_accounting", reason="needs the extra 'dp'")
    limit = epsilon(2.0, 2, 1e-5)
    assert limit is not None
    strategy = dp(4, noise=2.0, max_epsilon=limit + 1e-9)
    shared = [np.zeros(4, np.float32)]
    for _ in range(4):
        shared.append(step(strategy, np.ones((4, 4)), start=shared[-1]))
    assert (shared[1] != shared[0]).all()
    assert (shared[2] != shared[1]).all()
    assert (shared[3] == shared[2]).all()
    assert (shared[4] == shared[2]).all()
    assert strategy.epsilon == limit


def test_privacy_without_its_accountant_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(UserError, match=r"pip install 'fedprompt\[dp\]'"):
        make_strategy("dp_fedavg", (4,), 4)


def test_epsilon_is_in_every_line(run_config: Callable[..., Any]) -> None:
    pytest.importorskip("dp_accounting", reason="needs the extra 'dp'")
    strategy = {"name": "dp_fedavg", "noise": 4.0}
    folder = run(
        run_config(method={"name": "promptfl", "context_tokens": 2}, strategy=strategy),
        make_display(),
    )
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    spent = [x["strategy"]["epsilon"] for x in lines if "strategy" in x]
    assert spent == [epsilon(4.0, n, 1e-5) for n in (1, 2, 3)]
    assert all(x["strategy"]["delta"] == 1e-5 for x in lines[1:])


@pytest.mark.parametrize(("name", "mode"), [("dp_fedavg", 0o600), ("fedavg", 0o644)])
def test_only_the_owner_can_read_a_checkpoint_with_the_key_of_the_noise(
    make_workspace: Callable[..., Any], tmp_path: Path, name: str, mode: int
) -> None:
    settings = {"name": name, "noise": 0.0} if name == "dp_fedavg" else {"name": name}
    workspace = make_workspace(method={"name": "promptfl", "context_tokens": 2}, strategy=settings)
    checkpoint = Federation(workspace, InlineGrid(workspace)).checkpoint(0, {"rejected": 0})
    folder = RunFolder(tmp_path)
    # An older file that everybody can read does not decide it.
    (tmp_path / CHECKPOINT).write_bytes(b"")
    (tmp_path / CHECKPOINT).chmod(0o644)
    folder.save_checkpoint(checkpoint)
    folder.close()
    assert stat.S_IMODE((tmp_path / CHECKPOINT).stat().st_mode) == mode
