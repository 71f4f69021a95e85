from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.fields import build
from fedprompt.errors import UserError
from fedprompt.federation.registry import strategy_class
from fedprompt.federation.screening import Update
from fedprompt.methods.base import uploaded_numbers
from fedprompt.methods.scaffold import coefficients
from tests.support import twins
from tests.support.twins import SIZES

N = len(SIZES)


def server(shapes: dict[str, tuple[int, ...]], **options: Any) -> Any:
    cls = strategy_class("scaffold")
    strategy = cls(
        build(cls.Config, {"name": "scaffold", **options}, "strategy"), shapes=shapes, seed=1
    )
    strategy.set_nodes({k: 500 + k for k in range(N)})
    return strategy


def aggregate(strategy: Any, shared: dict[str, Any], results: list[Any]) -> dict[str, Any]:
    arrays = {n: t.numpy() for n, t in shared.items()}
    updates = [
        Update(r.client, {n: t.numpy() for n, t in r.shared.items()}, r.num_examples)
        for r in results
    ]
    return {n: torch.from_numpy(a) for n, a in strategy.aggregate(1, arrays, updates).items()}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_three_rounds_of_a_federation_by_hand(clip: FrozenCLIP, momentum: float) -> None:
    """c_k is tracked as the (weighted) mean of the gradients themselves, not from the prompts."""
    training = twins.config(momentum=momentum, lr=0.01)
    method = twins.build(clip, "scaffold", options={"context_tokens": 3})
    data = twins.clients(clip)
    shared = method.init_shared(1)
    strategy = server({n: tuple(t.shape) for n, t in shared.items()})
    private = [method.init_private(1, k) for k in range(N)]
    x, c = shared["ctx"].clone(), torch.zeros_like(shared["ctx"])
    c_k = [torch.zeros_like(c) for _ in range(N)]
    for server_round, present in ((1, (0, 1)), (2, (1, 2)), (3, (0, 1, 2))):
        results = twins.train(
            method,
            [shared] * len(present),
            [private[k] for k in present],
            [data[k] for k in present],
            training,
            server_round,
        )
        moves, differences = [], []
        for k, result in zip(present, results, strict=True):
            seen: list[torch.Tensor] = []

            def step(
                w: torch.Tensor,
                f: torch.Tensor,
                y: torch.Tensor,
                k: int = k,
                seen: Any = seen,
                c: torch.Tensor = c,
            ) -> torch.Tensor:
                raw = twins.ce_gradient(clip, w, f, y)
                seen.append(raw + training.weight_decay * w)
                return raw - c_k[k] + c

            after = twins.local_sgd(data[k], training, server_round, x, step)
            moves.append(after - x)
            counts = [sum(momentum**i for i in range(len(seen) - s)) for s in range(len(seen))]
            mean = sum(a * g for a, g in zip(counts, seen, strict=True)) / sum(counts)
            differences.append(mean - c_k[k])
            c_k[k] = mean
            twins.near(result.shared["ctx"], after, x)
            twins.near(result.private["control.ctx"], mean, torch.zeros_like(mean))
            private[k] = result.private
        shared = aggregate(strategy, shared, results)
        x = x + sum(moves) / len(moves)
        c = c + len(present) / N * (sum(differences) / len(differences))
        twins.near(shared["ctx"], x, x - sum(moves) / len(moves))
        twins.near(shared["control.ctx"], c, torch.zeros_like(c))


def test_with_all_clients_c_is_the_mean_of_the_c_k(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "scaffold", options={"context_tokens": 3})
    training, data = twins.config(momentum=0.0), twins.clients(clip)
    shared = method.init_shared(1)
    private = [method.init_private(1, k) for k in range(N)]
    strategy = server({n: tuple(t.shape) for n, t in shared.items()})
    for server_round in (1, 2):
        results = twins.train(method, [shared] * N, private, data, training, server_round)
        shared = aggregate(strategy, shared, results)
        private = [r.private for r in results]
    mean = torch.stack([p["control.ctx"] for p in private]).mean(0)
    twins.near(shared["control.ctx"], mean, torch.zeros_like(mean))


def test_coefficients_of_momentum() -> None:
    """Three steps with m = 0.5: the gradients count 1.75, 1.5 and 1 times."""
    assert coefficients(torch.tensor([1, 3, 10]), 0.5)[1].item() == pytest.approx(4.25)
    assert coefficients(torch.tensor([1, 3, 10]), 0.0).tolist() == [1, 3, 10]
    assert coefficients(torch.tensor([1]), 0.9).item() == pytest.approx(1.0)


def test_private_prompts_of_the_base_have_no_control(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "scaffold", base="fedrsclip")
    assert set(method.init_shared(1)) == {"ctx", "control.ctx"}
    assert set(method.init_private(1, 0)) == {"ctx", "control.ctx"}
    assert method.frozen == {"shared.control.ctx", "private.control.ctx"}
    assert uploaded_numbers(method) == 2 * uploaded_numbers(twins.build(clip, "fedrsclip"))
    training, data = twins.config(), twins.clients(clip)
    start = [method.init_private(1, k) for k in range(N)]
    results = twins.train(method, [method.init_shared(1)] * N, start, data, training, 1)
    for before, result in zip(start, results, strict=True):
        assert not torch.equal(before["ctx"], result.private["ctx"])
        assert result.shared["control.ctx"].any()
        assert result.losses["control"] == 0


def test_server_by_hand() -> None:
    """lr 0.5, two of three clients: prompts go half the mean step, c by two thirds of its mean."""
    strategy = server({"ctx": (1, 2), "control.ctx": (1, 2)}, lr=0.5)
    shared = {"ctx": np.array([[1.0, 2.0]], np.float32), "control.ctx": np.ones((1, 2), np.float32)}
    updates = [
        Update(
            0,
            {
                "ctx": np.array([[3.0, 2.0]], np.float32),
                "control.ctx": np.array([[3.0, 0.0]], np.float32),
            },
            1,
        ),
        Update(
            2,
            {
                "ctx": np.array([[1.0, 6.0]], np.float32),
                "control.ctx": np.array([[0.0, 6.0]], np.float32),
            },
            9,
        ),
    ]
    new = strategy.aggregate(1, shared, updates)
    np.testing.assert_allclose(new["ctx"], [[1.5, 3.0]])
    np.testing.assert_allclose(new["control.ctx"], [[2.0, 3.0]])
    by_samples = server({"ctx": (1, 2), "control.ctx": (1, 2)}, weights="samples")
    new = by_samples.aggregate(1, shared, updates)
    np.testing.assert_allclose(new["ctx"], [[1.2, 5.6]], rtol=1e-6)
    np.testing.assert_allclose(new["control.ctx"], [[2.0, 3.0]])


def test_a_base_with_a_strategy_of_its_own_is_refused(clip: FrozenCLIP) -> None:
    with pytest.raises(UserError, match="'nearest_peers'"):
        twins.build(clip, "scaffold", base="pfedmoap")
