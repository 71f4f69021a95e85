"""ReBaPL: twins of both distances, of eq. 16 and of the ensemble; what is refused."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.errors import UserError
from fedprompt.experiment.validate import validate
from fedprompt.methods.base import Tensors, stack, uploaded_numbers
from fedprompt.methods.rebapl import squared_mmd, squared_wasserstein
from fedprompt.rng import normal
from fedprompt.training import learning_rate
from tests.support import twins
from tests.support.twins import REAL, ROUNDS, SEED, K

CTX = {"context_tokens": 2}


def plain_mmd(a: Tensor, b: Tensor, bandwidth: float) -> Tensor:
    def mean(x: Tensor, y: Tensor) -> Tensor:
        pairs = [torch.exp(-((u - v) ** 2).sum() / (2 * bandwidth**2)) for u in x for v in y]
        return torch.stack(pairs).sum() / (len(x) * len(y))

    return mean(a, a) + mean(b, b) - 2 * mean(a, b)


def plain_wasserstein(a: Tensor, b: Tensor, _: float) -> Tensor:
    """The least cost of all assignments."""
    costs = [
        torch.stack([((a[i] - b[j]) ** 2).sum() for i, j in enumerate(order)]).mean()
        for order in itertools.permutations(range(len(b)))
    ]
    return costs[int(torch.stack(costs).argmin())]


DISTANCES: Any = {
    "mmd": (squared_mmd, plain_mmd),
    "wasserstein": (squared_wasserstein, plain_wasserstein),
}


@pytest.mark.parametrize("name", DISTANCES)
def test_distances(clip: FrozenCLIP, name: str) -> None:
    ours, theirs = DISTANCES[name]
    mask = twins.batch(clip).mask_KB
    a = twins.draw(K, mask.shape[1], 4, seed=1).requires_grad_()
    b = twins.draw(K, mask.shape[1], 4, seed=2)
    found = ours(a, b, mask, 1.5)
    (gradient,) = torch.autograd.grad(found.sum(), a)
    for k in range(K):
        own = a.detach()[k, : REAL[k]].requires_grad_()
        expected = theirs(own, b[k, : REAL[k]], 1.5)
        twins.close(found[k], expected)
        twins.close(gradient[k, : REAL[k]], torch.autograd.grad(expected, own)[0])
        assert not gradient[k, REAL[k] :].any(), "padding is not compared"


def test_mmd_of_neighbours_is_not_lost_in_rounding() -> None:
    a = 5 + twins.draw(1, 6, 3, seed=1)
    b = a + 1e-2
    exact = plain_mmd(a[0].double(), b[0].double(), 1.0)
    twins.close(squared_mmd(a, b, torch.ones(1, 6), 1.0)[0].double(), exact, rtol=0.01)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(("server_round", "noise"), [(1, False), (3, False), (4, True)])
def test_local_training_is_eq_16(
    clip: FrozenCLIP, momentum: float, server_round: int, noise: bool
) -> None:
    """Two cycles of two rounds; the second is repelled, and the last round has noise."""
    xi, epsilon, temperature, gamma = 0.02, 0.5, 0.3, 0.01
    method = twins.build(
        clip, "rebapl", options=CTX, cycles=2, repulsion=xi, epsilon=epsilon, exploration=0.5,
        temperature=temperature, noise_estimate=gamma,
    )  # fmt: skip
    assert ROUNDS == 4
    training, data = twins.config(momentum=momentum, weight_decay=0.1), twins.clients(clip)
    start = method.init_shared(1)["ctx"]
    sample = start + 0.1 * twins.draw(*start.shape, seed=4)
    extras = {"samples.ctx": sample[None], "samples.known": torch.ones(1)}
    received = {"ctx": start, **extras}
    results = twins.train(method, [received] * 3, [{}] * 3, data, training, server_round)
    lr, eta = training.lr, 1 - momentum
    before = twins.class_features(clip, sample).detach()
    for one, result in zip(data, results, strict=True):
        theta, r = start.clone(), torch.zeros_like(start)
        for step, rows in enumerate(twins.batches(one, training, server_round)):
            images = one.inputs.features[rows]
            u = twins.ce_gradient(clip, theta, images, one.labels_N[rows]) + 0.1 * theta
            r = (1 - eta) * r - lr * u
            if server_round > 2:
                leaf = theta.clone().requires_grad_()
                now = images @ twins.class_features(clip, leaf).T
                v = 1 / (plain_mmd(now, images @ before.T, 1.0) + epsilon)
                # Spread over the steps that follow, what it pushes in total is xi F.
                r = r - xi * eta * torch.autograd.grad(v, leaf)[0]
            if noise:
                key = ("sghmc", "shared.ctx", step, server_round, one.client)
                e = normal(tuple(theta.shape), 1.0, SEED, *key)
                r = r - math.sqrt(2 * (eta - gamma) * temperature * lr / len(one)) * e
            theta = theta + r
        twins.near(result.shared["ctx"], theta, start)
        assert (result.losses["repulsion"] < 0) == (server_round > 2)


def test_without_a_sample_nothing_repels(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "rebapl", options=CTX, temperature=0)
    received = {**method.init_shared(1), **method.init_extras(1)}
    data = twins.clients(clip)
    ours, theirs = (
        twins.train(m, [r] * 3, [{}] * 3, data, twins.config(), 3)
        for m, r in ((method, received), (method.base, method.init_shared(1)))  # type: ignore[attr-defined]
    )
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.shared["ctx"], b.shared["ctx"])


def test_prediction_is_the_mean_of_probabilities(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "rebapl", base="fedrsclip", options={"dpa": "kl"})
    base = method.base  # type: ignore[attr-defined]
    one = {**method.init_shared(1), **method.init_extras(1)}
    for n in base.init_shared(1):
        one[f"samples.{n}"] = 0.1 * twins.draw(2, *base.init_shared(1)[n].shape, seed=7)
    images = twins.batch(clip).inputs
    private = stack([method.init_private(1, k) for k in range(K)])
    for known in ([1.0, 1.0], [0.0, 1.0], [0.0, 0.0]):
        shared = stack([{**one, "samples.known": torch.tensor(known)}] * K)
        for own, inputs in ((private, images), (None, images)):
            encoded = method.encode(shared, own)
            rows = [shared] + [
                {n: shared[f"samples.{n}"][:, row] for n in base.init_shared(1)}
                for row in range(2)
                if known[row]
            ]
            probabilities = [
                base.logits(base.encode({n: r[n] for n in base.init_shared(1)}, own), inputs)
                .softmax(-1)
                for r in rows
            ]  # fmt: skip
            mean = torch.stack(probabilities).mean(0)
            twins.close(method.logits(encoded, inputs).softmax(-1), mean)
            assert (method.class_embeddings(encoded) is None) == (len(rows) > 1)


def test_the_base_s_extras_and_uploads_stay(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "rebapl", base="maple", cycles=4)
    base = method.base  # type: ignore[attr-defined]
    assert uploaded_numbers(method) == uploaded_numbers(base)
    assert {n: t.shape[0] for n, t in method.init_extras(1).items()} == dict.fromkeys(
        [*(f"samples.{n}" for n in base.init_shared(1)), "samples.known"], 3
    )


def test_the_rate_restarts_in_every_cycle() -> None:
    config = validate({"method": {"name": "rebapl"}, "strategy": {"name": "auto"}})
    assert config.strategy.name == "posterior_samples"
    rates = [learning_rate(config.training, r, 15, config.method.lr_cycles) for r in range(1, 16)]
    one = [0.002 / 2 * (1 + math.cos(math.pi * t / 5)) for t in range(5)]
    assert rates == pytest.approx(one * 3)
    weights = {"name": "rebapl", "base": "fedtpg"}
    assert validate({"method": weights, "strategy": {"name": "auto"}}).strategy.weights == "uniform"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"method": {"cycles": 1}}, "cycles"),
        ({"method": {"base": "per_class_x"}}, "per_class_x"),
        ({"method": {"base": "mocoop"}}, "'per_expert'"),
        ({"training": {"optimizer": "adam"}}, "training.optimizer=sgd"),
        ({"strategy": {"name": "fedavg"}}, "posterior_samples"),
    ],
)
def test_what_is_refused(keys: dict[str, Any], message: str) -> None:
    method = {"name": "rebapl", **keys.pop("method", {})}
    with pytest.raises(UserError, match=message):
        validate({"method": method, "strategy": {"name": "auto"}, **keys})


def test_gradient_of_a_step_without_momentum_is_langevin(clip: FrozenCLIP) -> None:
    """The noise of a client with N images has the variance 2 temperature / (N lr)."""
    method = twins.build(clip, "rebapl", options={"context_tokens": 16}, exploration=0.0)
    shared = stack([{**method.init_shared(1), **method.init_extras(1)}] * K)
    leaf: Tensors = {"shared.ctx": shared["ctx"].requires_grad_()}
    data = twins.batch(clip)
    terms = twins.loss_of(method, shared, {}, data)
    noisy = method.gradients(terms, leaf, data)["shared.ctx"]
    base = method.base  # type: ignore[attr-defined]
    plain = base.gradients(twins.loss_of(base, shared, {}, data), leaf, data)["shared.ctx"]
    assert noisy is not None
    info = data.round_info
    for k, noise in enumerate(noisy - plain):
        images = float(info.class_counts_KC[k].sum())
        expected = math.sqrt(2 * (1 - info.momentum) * 0.002 / (images * info.lr))
        assert float(noise.std()) == pytest.approx(expected, rel=0.1)
    assert not torch.equal(F.normalize(noisy[0] - plain[0]), F.normalize(noisy[1] - plain[1]))
