from __future__ import annotations

from typing import Any

import pytest
import torch

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.errors import UserError
from fedprompt.methods.base import Tensors, stack
from tests.support import twins
from tests.support.builders import batch_of
from tests.support.twins import B, K

BASES: list[tuple[str, dict[str, Any]]] = [
    ("promptfl", {"context_tokens": 4}),
    ("kgcoop", {}),
    ("fedrsclip", {"dpa": "kl"}),
]


def held(method: Any, scale: float = 0.05) -> tuple[Tensors, Tensors, Tensors]:
    """Shared and private leaves of K clients, and what they are said to have received."""
    received = stack([method.init_shared(k) for k in range(K)])
    private = (
        stack([method.init_private(1, k) for k in range(K)])
        if method.base.name == "fedrsclip"
        else {}
    )
    noise = torch.Generator().manual_seed(5)
    shared = {n: t + scale * torch.randn(t.shape, generator=noise) for n, t in received.items()}
    for tensors in (shared, private):
        for t in tensors.values():
            t.requires_grad_()
    return shared, private, received


@pytest.mark.parametrize(("base", "options"), BASES)
def test_loss_and_gradients_are_the_base_s_plus_the_pull(
    clip: FrozenCLIP, base: str, options: dict[str, Any]
) -> None:
    method = twins.build(clip, "fedprox", base=base, options=options, mu=0.3)
    plain = twins.build(clip, base, **options)
    shared, private, received = held(method)
    data = twins.batch(clip)
    data = batch_of(data.inputs, data.labels_KB, data.mask_KB, received=received)
    loss_terms = method.loss_terms(shared, private, method.encode(shared, private), data)
    for k in range(K):
        squares = sum(
            float(((a - b) ** 2).detach())
            for a, b in zip(shared["ctx"][k].flatten(), received["ctx"][k].flatten(), strict=True)
        )
        assert loss_terms["prox"][k].item() == pytest.approx(0.15 * squares, rel=1e-4)
    leaves = {f"shared.{n}": t for n, t in shared.items()}
    leaves |= {f"private.{n}": t for n, t in private.items()}
    ours = method.gradients(loss_terms, leaves, data)
    theirs = plain.gradients(
        plain.loss_terms(shared, private, plain.encode(shared, private), data), leaves, data
    )
    pull = 0.3 * (shared["ctx"] - received["ctx"])
    assert ours["shared.ctx"] is not None
    assert theirs["shared.ctx"] is not None
    twins.close(ours["shared.ctx"], theirs["shared.ctx"] + pull)
    for name in private:
        a, b = ours[f"private.{name}"], theirs[f"private.{name}"]
        assert a is not None
        assert b is not None
        twins.close(a, b)
    assert data.labels_KB.shape == (K, B)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_local_training_by_hand(clip: FrozenCLIP, momentum: float) -> None:
    """Every step's gradient has mu (w - received), with what the round began with."""
    method = twins.build(clip, "fedprox", options={"context_tokens": 3}, mu=2.0)
    training, data = twins.config(momentum=momentum), twins.clients(clip)
    start = method.init_shared(1)
    results = twins.train(method, [start] * 3, [{}] * 3, data, training, 1)
    free = twins.train(method.base, [start] * 3, [{}] * 3, data, training, 1)
    for one, result, unheld in zip(data, results, free, strict=True):
        expected = twins.local_sgd(
            one,
            training,
            1,
            start["ctx"],
            lambda w, x, y: twins.ce_gradient(clip, w, x, y) + 2.0 * (w - start["ctx"]),
        )
        twins.near(result.shared["ctx"], expected, start["ctx"])
        assert (result.shared["ctx"] - start["ctx"]).norm() < (
            unheld.shared["ctx"] - start["ctx"]
        ).norm()
        assert result.losses["prox"] > 0


def test_a_base_that_projects_its_gradients_sees_its_own_terms_only(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "fedprox", base="prograd", mu=0.3)
    plain = twins.build(clip, "prograd")
    received = stack([method.init_shared(k) for k in range(K)])
    shared = {n: (t + 0.05).requires_grad_() for n, t in received.items()}
    data = twins.batch(clip)
    data = batch_of(data.inputs, data.labels_KB, data.mask_KB, received=received)
    leaves = {f"shared.{n}": t for n, t in shared.items()}
    ours = method.gradients(
        method.loss_terms(shared, {}, method.encode(shared, {}), data), leaves, data
    )
    theirs = plain.gradients(
        plain.loss_terms(shared, {}, plain.encode(shared, {}), data), leaves, data
    )
    for name, found in ours.items():
        other = theirs[name]
        assert found is not None
        assert other is not None
        twins.close(found, other + 0.3 * 0.05)


def test_a_base_without_shared_prompts_is_refused(clip: FrozenCLIP) -> None:
    with pytest.raises(UserError, match="'coop_local' has none"):
        twins.build(clip, "fedprox", base="coop_local")
