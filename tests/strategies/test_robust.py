"""Server rules against numbers worked out by hand, slow twins and Flower's own."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, RecordDict
from flwr.serverapp.strategy.fedtrimmedavg import trim_mean
from flwr.serverapp.strategy.multikrum import select_multikrum
from numpy.typing import NDArray

from fedprompt.errors import UserError
from fedprompt.federation.registry import strategy_class
from fedprompt.federation.screening import Update
from fedprompt.federation.strategy import SharedPromptStrategy
from fedprompt.messages import Arrays
from fedprompt.privacy.accountant import epsilon
from fedprompt.strategies.aligned import agreement
from fedprompt.strategies.clustered import Clustered, groups
from fedprompt.strategies.dp_fedavg import DPFedAvg
from fedprompt.strategies.parts.robust import mixed
from fedprompt.strategies.parts.vectors import changes, clipped, count_of, moved
from tests.federation.test_strategy import _identity, answer, full, send, shared_after  # noqa: F401
from tests.federation.test_strategy import make as make_plain

Rows = NDArray[np.float64]


def make(name: str, shape: tuple[int, ...], clients: int = 10, **options: Any) -> Any:
    config = strategy_class(name).Config(name=name, **options)
    return make_plain(clients, name, config=config, shapes={"ctx": shape})


def updates_of(rows: Any, images: Any = None) -> list[Update]:
    return [
        Update(k, {"ctx": np.asarray(row, np.float32)}, 1 if images is None else images[k])
        for k, row in enumerate(rows)
    ]


def step(strategy: SharedPromptStrategy, rows: Any, start: Any = None, images: Any = None) -> Rows:
    updates = updates_of(rows, images)
    last = np.zeros_like(updates[0].arrays["ctx"]) if start is None else np.asarray(start)
    shared = {"ctx": last.astype(np.float32)}
    strategy.sampled = [u.client for u in updates]
    return strategy.aggregate(1, shared, updates)["ctx"]


def random_rows(clients: int = 10, numbers: int = 6, seed: int = 0) -> Rows:
    return np.random.default_rng(seed).standard_normal((clients, numbers))


# Rows of a matrix


def test_changes_and_back() -> None:
    shared: Arrays = {"b": full(1.0), "a": np.array([5.0], np.float32)}
    update = Update(0, {"a": np.array([7.0], np.float32), "b": full(4.0)}, 1)
    rows = changes(shared, [update])
    assert rows.tolist() == [[3.0, 3.0, 3.0, 3.0, 2.0]], "in the order of the shared tensors"
    after = moved(shared, rows[0])
    assert {n: a.tolist() for n, a in after.items()} == {"b": full(4.0).tolist(), "a": [7.0]}


def test_clipping_keeps_directions() -> None:
    rows = clipped(np.array([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]]), 1.0)
    np.testing.assert_allclose(rows, [[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]])


@pytest.mark.parametrize(
    ("share", "clients", "count"), [(0.3, 10, 3), (0.1, 30, 3), (0.29, 100, 29), (0.3, 3, 0)]
)
def test_shares_of_clients(share: float, clients: int, count: int) -> None:
    assert count_of(share, clients) == count


# Momentum and adaptive rules


def test_fedavgm_by_hand() -> None:
    strategy = make("fedavgm", (1,), momentum=0.5, lr=2.0)
    # Changes 3 (mean of 1 and 4, weights 1 and 2), then 1: v = 3, then 0.5 * 3 + 1 = 2.5.
    assert step(strategy, [[1.0], [4.0]], images=[1, 2]).tolist() == [6.0]
    assert step(strategy, [[7.0], [7.0]], start=[6.0]).tolist() == [11.0]


def test_fedavgm_without_momentum_is_fedavg() -> None:
    rows, images = random_rows(), list(range(1, 11))
    ours = step(make("fedavgm", (6,), momentum=0.0), rows, images=images)
    np.testing.assert_allclose(ours, step(make("fedavg", (6,)), rows, images=images), rtol=1e-6)


def test_fedadam_by_hand() -> None:
    strategy = make("fedadam", (1,), lr=0.1, beta_1=0.9, beta_2=0.99, tau=0.01)
    mean, square, x = 0.0, 0.01**2, 0.0
    for change in (2.0, -1.0, 0.5):
        mean, square = 0.9 * mean + 0.1 * change, 0.99 * square + 0.01 * change**2
        expected = x + 0.1 * mean / (math.sqrt(square) + 0.01)
        new = step(strategy, [[x + change]], start=[x])
        np.testing.assert_allclose(new, [expected], rtol=1e-5)
        x = float(new[0])


def test_fedyogi_by_hand() -> None:
    strategy = make("fedyogi", (1,), lr=0.1, beta_1=0.9, beta_2=0.99, tau=0.01)
    mean, square, x = 0.0, 0.01**2, 0.0
    for change in (2.0, -1.0, 0.01):
        mean = 0.9 * mean + 0.1 * change
        square -= 0.01 * change**2 * math.copysign(1, square - change**2)
        expected = x + 0.1 * mean / (math.sqrt(square) + 0.01)
        new = step(strategy, [[x + change]], start=[x])
        np.testing.assert_allclose(new, [expected], rtol=1e-5)
        x = float(new[0])
    assert square < 0.0001 + 0.01 * 5, "the last, small change has lowered it"


# Robust rules


def test_trimmed_mean_by_hand_and_flowers() -> None:
    rows = [[1.0], [2.0], [3.0], [4.0], [100.0]]
    assert step(make("trimmed_mean", (1,), attackers=0.2), rows).tolist() == [3.0]
    assert step(make("trimmed_mean", (1,), attackers=0.4), rows).tolist() == [3.0]
    assert step(make("trimmed_mean", (1,), attackers=0.0), rows).tolist() == [22.0]
    many = random_rows()
    ours = step(make("trimmed_mean", (6,), attackers=0.3), many)
    np.testing.assert_allclose(ours, trim_mean(many.astype(np.float32), 0.3), rtol=1e-5, atol=1e-6)


def test_median_by_hand() -> None:
    rows = [[1.0, 9.0], [2.0, 8.0], [1e3, -1e3]]
    assert step(make("median", (2,)), rows).tolist() == [2.0, 8.0]
    assert step(make("median", (2,)), rows[:2]).tolist() == [1.5, 8.5]


def krum_by_loops(rows: Rows, attackers: int, keep: int) -> set[int]:
    """The paper's definition, one distance at a time."""
    scores = []
    for i, own in enumerate(rows):
        distances = sorted(
            sum((a - b) ** 2 for a, b in zip(own, other, strict=True))
            for j, other in enumerate(rows)
            if j != i
        )
        scores.append(sum(distances[: len(rows) - attackers - 2]))
    return set(sorted(range(len(rows)), key=lambda i: scores[i])[:keep])


@pytest.mark.parametrize("seed", range(5))
def test_krum_is_the_papers_and_flowers(seed: int) -> None:
    rows = random_rows(seed=seed)
    (best,) = krum_by_loops(rows, 3, 1)
    np.testing.assert_allclose(step(make("krum", (6,)), rows), rows[best], rtol=1e-6)
    kept = sorted(krum_by_loops(rows, 3, 7))
    ours = step(make("multi_krum", (6,)), rows)
    np.testing.assert_allclose(ours, rows[kept].mean(axis=0), rtol=1e-5, atol=1e-7)
    records = [RecordDict({"a": ArrayRecord({"ctx": _array(r)})}) for r in rows]
    theirs = select_multikrum(records, num_malicious_nodes=3, num_nodes_to_select=7)
    assert {records.index(r) for r in theirs} == set(kept)


def _array(row: Rows) -> Any:
    from fedprompt.messages import to_array

    return to_array(row.astype(np.float32))


def test_krum_sees_small_changes_of_large_prompts() -> None:
    # Between whole prompts of norm 1e4 in float32 these distances would all be rounding.
    start = np.full(6, 4096.0)
    rows = random_rows() * 0.01
    (best,) = krum_by_loops(((start + rows).astype(np.float32) - start), 3, 1)
    after = step(make("krum", (6,)), start + rows, start=start)
    assert after.tolist() == (start + rows).astype(np.float32)[best].tolist()


@pytest.mark.parametrize("name", ["trimmed_mean", "median", "krum", "multi_krum"])
def test_three_of_ten_attackers_do_no_harm(name: str) -> None:
    draw = np.random.default_rng(1)
    honest = 1 + 0.1 * draw.standard_normal((7, 50))
    for attack in (-10 * np.ones((3, 50)), 1e3 * draw.standard_normal((3, 50)), np.zeros((3, 50))):
        rows = np.concatenate([attack, honest])
        after = step(make(name, (50,)), rows)
        assert np.abs(after - 1).max() < 0.35
        assert np.abs(step(make("fedavg", (50,)), rows) - 1).max() > 0.29


def test_mixing_by_hand() -> None:
    # Nearest two of three: {0, 1}, {0, 1}, {2, 1}.
    rows = np.array([[0.0], [1.0], [10.0]])
    assert mixed(rows, 1).tolist() == [[0.5], [0.5], [5.5]]
    assert mixed(rows, 0).tolist() == [[11 / 3]] * 3
    assert step(make("median", (1,), attackers=0.34, mix=True), rows).tolist() == [0.5]


@pytest.mark.parametrize("name", ["trimmed_mean", "median", "krum", "multi_krum"])
def test_mixing_leaves_far_attackers_out_of_very_different_clients(name: str) -> None:
    draw = np.random.default_rng(3)
    honest = 0.3 + draw.standard_normal((7, 400))
    rows = np.concatenate([honest, -5 * honest[:3]])
    error = [
        float(np.linalg.norm(step(make(name, (400,), mix=mix), rows) - honest.mean(0)))
        for mix in (True, False)
    ]
    assert error[0] < 1e-4, "what is left is the mean of the honest clients"
    assert name == "multi_krum" or error[1] > 1.0, "the plain rules do worse here"


def test_norm_clipping_by_hand() -> None:
    rows = [[3.0, 4.0], [0.0, 1.0], [0.0, -60.0]]
    expected = [0.6 / 3, (0.8 + 1 - 1) / 3]
    after = step(make("norm_clipping", (2,), bound=1.0), rows)
    np.testing.assert_allclose(after, expected, rtol=1e-6)
    median = step(make("norm_clipping", (2,)), rows)
    np.testing.assert_allclose(median, [1.0, (4 + 1 - 5) / 3], rtol=1e-6, atol=1e-7)
    wide = make("norm_clipping", (2,), bound=1e9, weights="samples")
    fedavg = step(make("fedavg", (2,)), rows, images=[1, 2, 3])
    np.testing.assert_allclose(step(wide, rows, images=[1, 2, 3]), fedavg, rtol=1e-6)


# Aligned


def test_aligned_without_sharpness_and_trust_region_is_fedavg() -> None:
    rows, images = random_rows(), [7, 1, 50, 3, 9, 2, 80, 4, 5, 6]
    limit = make("aligned", (6,), sharpness=0.0, trust=None)
    fedavg = step(make("fedavg", (6,)), rows, images=images)
    np.testing.assert_allclose(step(limit, rows, images=images), fedavg, rtol=1e-6, atol=1e-7)
    nearly = make("aligned", (6,), sharpness=1e-9, trust=1e9)
    np.testing.assert_allclose(step(nearly, rows, images=images), fedavg, rtol=1e-6, atol=1e-7)
    usual = step(make("aligned", (6,)), rows, images=images)
    assert np.abs(usual - fedavg).max() > 1e-3, "and elsewhere it is not"


def test_aligned_by_hand() -> None:
    # Consensus (1, 0): the median of (1, 0), (1, 0) and (-1, 0). Agreement 1, 1, -1.
    rows = np.array([[2.0, 0.0], [2.0, 0.0], [-8.0, 0.0]])
    assert agreement(rows).tolist() == [1.0, 1.0, -1.0]
    free = make("aligned", (2,), sharpness=0.5, trust=None, credit=1.5)
    for lost in (1, 2):
        small = math.exp(-0.5 * lost)
        expected = (2 + 2 - 8 * small) / (2 + small)
        np.testing.assert_allclose(step(free, rows), [expected, 0], rtol=1e-6)
    assert free.scores == {0: 1.5, 1: 1.5, 2: -2.0}, "credit is limited"
    assert free.metrics() == {"below_zero": {"2": -2.0}}
    near = make("aligned", (2,), sharpness=0.5, trust=1.5)
    small = math.exp(-0.5)
    np.testing.assert_allclose(step(near, rows), [(4 - 3 * small) / (2 + small), 0], rtol=1e-6)


def test_aligned_remembers_after_a_restart() -> None:
    rows = np.array([[2.0, 0.0], [2.0, 0.0], [-8.0, 0.0]])
    strategy, resumed = make("aligned", (2,), trust=None), make("aligned", (2,), trust=None)
    step(strategy, rows)
    resumed.load_state(strategy.state())
    assert resumed.scores == {0: 1.0, 1: 1.0, 2: -1.0}
    assert (step(resumed, rows) == step(strategy, rows)).all()


def test_aligned_counts_those_who_agree_as_fedavg_does() -> None:
    draw = np.random.default_rng(1)
    rows = 1 + 0.5 * draw.standard_normal((10, 30))
    images = list(range(1, 11))
    fedavg = step(make("fedavg", (30,)), rows, images=images)
    after = step(make("aligned", (30,), trust=None), rows, images=images)
    np.testing.assert_allclose(after, fedavg, rtol=1e-6)


# Clustered


def two_kinds(clients: int = 6) -> Rows:
    """Clients 0, 2, 4 pull one way, 1, 3, 5 the other; each with noise of its own."""
    draw = np.random.default_rng(2)
    side = np.where(np.arange(clients) % 2 == 0, 1.0, -1.0)[:, None]
    return side + 0.1 * draw.standard_normal((clients, 8))


def test_groups_are_found() -> None:
    rows = two_kinds()
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    assert groups(rows, 2).tolist() == [0, 1, 0, 1, 0, 1]
    assert groups(rows, 1).tolist() == [0] * 6
    assert sorted(set(groups(rows, 6).tolist())) == list(range(6))
    assert groups(np.zeros((1, 8)), 3).tolist() == [0]


def test_every_cluster_is_sent_its_own_prompts() -> None:
    strategy = make("clustered", (8,), 6, common_rounds=1, clusters=2)
    start = {"ctx": np.zeros(8, np.float32)}
    rows = two_kinds().astype(np.float32)
    messages = send(strategy, start, 1)
    one = shared_after(strategy, [answer(m, {"ctx": r}) for m, r in zip(messages, rows)])  # noqa: B905
    assert one is not None
    assert all(strategy.client_shared(c) is None for c in range(6)), "a common round"
    messages = send(strategy, one, 2)
    arrays, _ = strategy.aggregate_train(
        2, [answer(m, {"ctx": r}) for m, r in zip(messages, rows, strict=True)]
    )
    assert strategy.cluster_of == {0: 0, 1: 1, 2: 0, 3: 1, 4: 0, 5: 1}
    assert strategy.metrics() == {"clusters": [3, 3]}
    sent = [_sent(m) for m in send(strategy, {"ctx": rows.mean(0)}, 3)]
    np.testing.assert_allclose(sent[0], rows[::2].mean(0), rtol=1e-5)
    np.testing.assert_allclose(sent[3], rows[1::2].mean(0), rtol=1e-5)
    assert arrays is not None
    np.testing.assert_allclose(_values(arrays), rows.mean(0), atol=1e-6)


def _sent(message: Any) -> Rows:
    return _values(message.content["arrays"])


def _values(record: Any) -> Rows:
    from fedprompt.messages import to_arrays

    return to_arrays(record)["ctx"]


def test_a_late_client_joins_the_nearest_cluster() -> None:
    strategy: Clustered = make("clustered", (8,), 6, common_rounds=0, clusters=2)
    rows = two_kinds()
    shared = {"ctx": np.zeros(8, np.float32)}
    strategy.aggregate(1, shared, updates_of(rows)[:4])
    assert strategy.client_shared(5) is None
    strategy.aggregate(2, shared, updates_of(rows)[4:])
    assert strategy.cluster_of == {0: 0, 1: 1, 2: 0, 3: 1, 4: 0, 5: 1}


def test_a_late_client_joins_after_a_restart_as_before() -> None:
    strategy, resumed = (make("clustered", (8,), 6, common_rounds=0) for _ in range(2))
    rows, shared = two_kinds(), {"ctx": np.zeros(8, np.float32)}
    strategy.aggregate(1, shared, updates_of(rows)[:4])
    resumed.load_state(strategy.state())
    resumed.aggregate(2, shared, updates_of(rows)[4:])
    assert resumed.cluster_of == {0: 0, 1: 1, 2: 0, 3: 1, 4: 0, 5: 1}


def test_one_cluster_is_fedavg() -> None:
    rows, images = random_rows(), list(range(1, 11))
    one = make("clustered", (6,), common_rounds=0, clusters=1)
    assert (step(one, rows, images=images) == step(make("fedavg", (6,)), rows, images=images)).all()


# Privacy


def dp(clients: int = 4, numbers: int = 4, **options: Any) -> DPFedAvg:
    pytest.importorskip("dp_accounting", reason="needs the extra 'dp'")
    strategy = make("dp_fedavg", (numbers,), clients, **options)
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


def test_epsilon_is_that_of_composed_gaussians() -> None:
    pytest.importorskip("dp_accounting", reason="needs the extra 'dp'")
    from scipy.optimize import brentq
    from scipy.stats import norm

    for noise, rounds in ((1.0, 1), (5.0, 30), (10.0, 30)):
        mu = math.sqrt(rounds) / noise

        def excess(e: float, mu: float = mu) -> float:
            """Balle and Wang (ICML 2018, arXiv 1805.06530), theorem 8, minus delta."""
            return float(
                norm.cdf(mu / 2 - e / mu) - math.exp(e) * norm.cdf(-mu / 2 - e / mu) - 1e-5
            )

        exact = brentq(excess, 0, 100)
        ours = epsilon(noise, rounds, 1e-5)
        assert ours is not None
        assert exact <= ours <= 1.1 * exact, "a bound, and not a loose one"
    assert epsilon(1.0, 0, 1e-5) == 0.0
    assert epsilon(0.0, 3, 1e-5) is None


def test_epsilon_counts_the_rounds_in_which_a_client_was_asked() -> None:
    strategy = dp(4, noise=2.0)
    start, rows = {"ctx": np.zeros(4, np.float32)}, updates_of(np.zeros((4, 4)))
    for server_round, asked in enumerate(([0, 1], [2, 3], [0, 2]), 1):
        strategy.sampled = asked
        strategy.aggregate(server_round, start, [rows[c] for c in asked])
    assert strategy.metrics()["releases"] == 2
    assert strategy.epsilon == epsilon(2.0, 2, 1e-5)


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
    import sys

    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(UserError, match=r"pip install 'fedprompt\[dp\]'"):
        make("dp_fedavg", (4,), 4)


# Screening


def test_a_client_that_boasts_is_dropped() -> None:
    strategy = make_plain(4)
    messages = send(strategy, {"ctx": full(0.0)})
    images = [10, 10**6, 20, 30]
    replies = [
        answer(m, {"ctx": full(float(k == 1))}, n)
        for k, (m, n) in enumerate(zip(messages, images, strict=True))
    ]
    after = shared_after(strategy, replies)
    assert after is not None
    assert after["ctx"].tolist() == full(0.0).tolist()
    assert list(strategy.rejected) == [1]
    assert "above max_examples_ratio=1000 times the median" in strategy.rejected[1]


def test_reasons_are_short_and_printable() -> None:
    strategy = make_plain(2)
    one, two = send(strategy, {"ctx": full(0.0)})
    evil = {f"\x1b[31m{'x' * 10_000}": full(1.0)}
    assert shared_after(strategy, [answer(one, evil), answer(two, {"ctx": full(1.0)})]) is not None
    assert len(strategy.rejected[0]) <= 300
    assert strategy.rejected[0].isprintable()
