"""Momentum that clients keep between rounds, against one torch optimiser per client."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.errors import UserError
from fedprompt.methods.base import Tensors
from fedprompt.optimizer import STORED, with_momentum, without_momentum
from fedprompt.simulation.inline_grid import InlineGrid
from fedprompt.training import LocalResult, train_clients
from fedprompt.workspace import Workspace
from tests.support import twins
from tests.support.builders import small_config
from tests.support.grids import assert_same, federate

MakeWorkspace = Callable[..., Workspace]
ROUNDS: tuple[tuple[int, ...], ...] = ((0, 1, 2), (0, 2), (2, 1, 0))
"""Who trains in each round; the clients have 6, 4 and 4 steps."""
KEEP = {"momentum_state": "keep"}


class Twin:
    """One client's torch optimiser, which is built once and lives for all rounds."""

    def __init__(self, start: Tensor) -> None:
        self.leaf = start.clone().requires_grad_()
        options = twins.config()
        self.sgd = torch.optim.SGD(
            [self.leaf], options.lr, options.momentum, weight_decay=options.weight_decay
        )

    def train(self, clip: FrozenCLIP, client: Any, server_round: int, start: Tensor) -> Tensor:
        self.leaf.data.copy_(start)
        for rows in twins.batches(client, twins.config(), server_round):
            features, labels = client.inputs.features[rows], client.labels_N[rows]
            self.leaf.grad = twins.ce_gradient(clip, self.leaf, features, labels)
            self.sgd.step()
        return self.leaf.detach().clone()


@pytest.mark.parametrize("name", ["promptfl", "coop_local"])
@pytest.mark.parametrize("block", [1, 3])
def test_kept_momentum_is_that_of_one_optimizer_per_client(
    clip: FrozenCLIP, name: str, block: int
) -> None:
    """`promptfl` starts each round from the average, `coop_local` from the client's own prompt."""
    method, data = twins.build(clip, name, context_tokens=3), twins.clients(clip)
    shares = bool(method.init_shared(1))
    start = (method.init_shared(1) or method.init_private(1, 0))["ctx"]
    optimizers = [Twin(start) for _ in data]
    ours, theirs = [start] * 3, [start] * 3
    momentum: list[Tensors] = [{}, {}, {}]
    for server_round, trains in enumerate(ROUNDS, start=1):
        before = list(theirs)
        for first in range(0, len(trains), block):
            part = trains[first : first + block]
            results = train_clients(
                method,
                [{"ctx": ours[k]} if shares else {} for k in part],
                [{} if shares else {"ctx": ours[k]} for k in part],
                [data[k] for k in part],
                twins.config(**KEEP),
                seed=twins.SEED,
                server_round=server_round,
                rounds=3,
                momentum=[momentum[k] for k in part],
            )
            for k, result in zip(part, results, strict=True):
                ours[k] = (result.shared if shares else result.private)["ctx"]
                momentum[k] = result.momentum
        for k in trains:
            theirs[k] = optimizers[k].train(clip, data[k], server_round, before[k])
            twins.near(ours[k], theirs[k], before[k])
            kept = optimizers[k].sgd.state[optimizers[k].leaf]["momentum_buffer"]
            (found,) = momentum[k].values()
            twins.close(found, kept, f"round {server_round}, client {k}")
        if shares:
            ours = [torch.stack(ours).mean(0)] * 3
            theirs = [torch.stack(theirs).mean(0)] * 3


def test_the_first_round_and_a_momentum_of_zero_are_as_if_nothing_was_kept(
    clip: FrozenCLIP,
) -> None:
    method, data = twins.build(clip, "fedrsclip"), twins.clients(clip)
    start = [method.init_private(1, k) for k in range(3)]

    def results(**options: Any) -> list[LocalResult]:
        received = [method.init_shared(1)] * 3
        return twins.train(method, received, start, data, twins.config(**options), 1)

    for ours, theirs in zip(results(**KEEP), results(), strict=True):
        assert torch.equal(ours.shared["ctx"], theirs.shared["ctx"])
        assert torch.equal(ours.private["ctx"], theirs.private["ctx"])
        assert set(ours.momentum) == {"shared.ctx", "private.ctx"}
        assert theirs.momentum == {}
    assert all(r.momentum == {} for r in results(momentum=0.0, **KEEP))


def test_a_gate_at_rest_keeps_its_momentum(clip: FrozenCLIP) -> None:
    """Client 1 meets its gate in the second round, beside clients that train theirs."""
    options = {"context_tokens": 3, "experts": 4, "gate_width": 16, "gate_heads": 4}
    method, data = twins.build(clip, "pfedmoap", **options), twins.clients(clip)
    peers = torch.stack([method.init_shared(k)["ctx"] for k in range(3)])
    received = method.init_shared(1) | {"peers.ctx": peers, "peers.known": torch.ones(3)}
    visits = [torch.tensor([float(k != 1)]) for k in range(3)]
    private = [method.init_private(1, k) | {"visits": visits[k]} for k in range(3)]
    results = twins.train(method, [received] * 3, private, data, twins.config(**KEEP), 2)
    for k, result in enumerate(results):
        gate = [t for n, t in result.momentum.items() if "gate." in n]
        assert len(gate) == 8
        assert any(bool(t.any()) for t in gate) == (k != 1)


@pytest.mark.parametrize("method", [{"name": "promptfl"}, {"name": "ditto"}, {"name": "fedrsclip"}])
def test_a_federation_keeps_momentum_beside_the_private_tensors(
    make_workspace: MakeWorkspace, method: dict[str, Any]
) -> None:
    def federated(per_block: int, **training: Any) -> tuple[Any, InlineGrid]:
        grid = InlineGrid(
            make_workspace(
                method=method,
                training=training,
                simulation={"clients_per_block": per_block},
                federation={"fraction": 0.75},
            )
        )
        return federate(grid), grid

    (together, grid), (alone, _) = federated(4, **KEEP), federated(1, **KEEP)
    assert_same(together, alone, rtol=1e-4)
    reset, _ = federated(4)
    assert any(not torch.equal(t, reset[0][n]) for n, t in together[0].items())
    assert not any(n.startswith(f"tensor/{STORED}") for n in reset[1])
    for client in range(4):
        private, momentum = without_momentum(grid.private.get(client) or {})
        assert set(private) == set(grid.workspace.method.init_private(1, client))
        assert {f"shared.{n}" for n in grid.workspace.method.init_shared(1)} <= set(momentum)


def test_what_is_stored_comes_back_as_it_was() -> None:
    private, momentum = {"ctx": torch.ones(2)}, {"private.ctx": torch.zeros(2)}
    stored = with_momentum(private, momentum)
    assert len(stored) == 2
    assert without_momentum(stored) == (private, momentum)
    assert without_momentum(private) == (private, {})


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"training": {**KEEP, "optimizer": "adam"}}, "training: 'momentum_state'"),
        (
            {"training": KEEP, "method": {"name": "scaffold"}, "strategy": {"name": "auto"}},
            "scaffold",
        ),
    ],
)
def test_what_cannot_keep_a_momentum_is_refused(sections: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        small_config(**sections)
