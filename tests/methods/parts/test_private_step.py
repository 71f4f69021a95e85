"""DP-SGD: the clipped sum of single images' gradients, its sensitivity, its noise, its batches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.protection import PrivacyConfig
from fedprompt.config.schema import TrainingConfig
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import Batch, ClientData, Tensors
from fedprompt.methods.parts.local_step import Computed, new_leaves
from fedprompt.methods.parts.private_step import PrivateStep
from fedprompt.methods.parts.schedule import draw_poisson, expected_size
from fedprompt.training import train_clients
from tests.support import twins

CLIP = 0.2
"""Below the norms of most gradients here, and above that of some."""
QUIET = PrivacyConfig(image_noise=1e-9, image_clip=CLIP, noise_seed=1)


def step_of(clip: FrozenCLIP, data: Batch, privacy: PrivacyConfig = QUIET) -> Computed:
    """One step of FedSEPT, which trains shared and private tensors, with sums and not means."""
    method = twins.build(clip, "fedsept", context_tokens=2, rank=4)
    shared, private = twins.tensors(method)
    both = {f"shared.{n}": t for n, t in shared.items()}
    both |= {f"private.{n}": t for n, t in private.items()}
    leaves = new_leaves({n: t.detach() for n, t in both.items()})
    return PrivateStep(method, leaves, {}, privacy, torch.ones(twins.K))(data)


def flat(gradients: dict[str, Tensor | None]) -> Tensor:
    """All gradients of each client as one row, (K, P)."""
    return torch.cat([g.flatten(1) for g in gradients.values() if g is not None], dim=1)


def one_by_one(clip: FrozenCLIP, data: Batch, k: int) -> Tensors:
    """The plain twin: a forward and a backward pass for each image of client k."""
    method = twins.build(clip, "fedsept", context_tokens=2, rank=4)
    shared, private = (twins.row(t, k) for t in twins.tensors(method))
    total: Tensors = {}
    own = twins.one_client(data, k)
    for i in range(twins.REAL[k]):
        image = replace(
            own, inputs=own.inputs[:, i : i + 1], labels_KB=own.labels_KB[:, i : i + 1],
            mask_KB=own.mask_KB[:, i : i + 1],
        )  # fmt: skip
        named = {f"shared.{n}": t for n, t in shared.items()}
        named |= {f"private.{n}": t for n, t in private.items()}
        terms = twins.loss_of(method, shared, private, image)
        found = twins.gradients(terms, list(named.values()))
        norm = float(torch.cat([g.flatten() for g in found]).norm())
        for name, gradient in zip(named, found, strict=True):
            total[name] = total.get(name, torch.zeros(())) + gradient[0] * min(1, CLIP / norm)
    return total


def test_the_sum_is_that_of_each_image_clipped_over_all_tensors(clip: FrozenCLIP) -> None:
    data = twins.batch(clip)
    ours = step_of(clip, data).gradients
    for k in range(twins.K):
        for name, theirs in one_by_one(clip, data, k).items():
            gradient = ours[name]
            assert gradient is not None
            twins.close(gradient[k], theirs, name)


def test_one_image_changes_the_sum_by_the_clip_at_most(clip: FrozenCLIP) -> None:
    data = twins.batch(clip)
    whole_KP = flat(step_of(clip, data).gradients)
    changes = []
    for column in range(twins.B):
        mask_KB = data.mask_KB.clone()
        mask_KB[:, column] = False
        without_KP = flat(step_of(clip, replace(data, mask_KB=mask_KB)).gradients)
        changes += (whole_KP - without_KP).norm(dim=1)[data.mask_KB[:, column]].tolist()
    assert max(changes) <= CLIP * (1 + 1e-4)
    assert max(changes) == pytest.approx(CLIP, rel=1e-3), "some gradient is longer than the clip"


def test_an_image_whose_gradient_is_not_finite_counts_as_missing(clip: FrozenCLIP) -> None:
    data = twins.batch(clip)
    features_KBD = data.inputs.features.clone()
    features_KBD[0, 1] = torch.nan
    mask_KB = data.mask_KB.clone()
    mask_KB[0, 1] = False
    broken = step_of(clip, replace(data, inputs=Inputs(features_KBD)))
    missing = step_of(clip, replace(data, mask_KB=mask_KB))
    assert flat(broken.gradients).equal(flat(missing.gradients))
    # A batch without any image has the noise alone.
    empty = step_of(clip, replace(data, mask_KB=torch.zeros_like(mask_KB)))
    assert 0 < float(flat(empty.gradients).abs().max()) < 1e-8
    assert empty.values_TA.isfinite().all()


def test_noise_has_the_stated_size_on_every_tensor_and_its_own_draw(clip: FrozenCLIP) -> None:
    data = twins.batch(clip)
    quiet = step_of(clip, data).gradients

    def noise(**changes: Any) -> dict[str, Tensor]:
        settings = {"image_noise": 3.0, "noise_seed": 7, "step": 0, **changes}
        step = replace(data, step=settings.pop("step"))
        gradients = step_of(clip, step, replace(QUIET, **settings)).gradients
        found = {}
        for name, gradient in gradients.items():
            without = quiet[name]
            assert gradient is not None
            assert without is not None
            found[name] = gradient - without
        return found

    drawn = noise()
    for name, values in drawn.items():
        if values.numel() >= 500:
            tolerance = 4 / (2 * values.numel()) ** 0.5
            assert float(values.std()) == pytest.approx(3 * CLIP, rel=tolerance), name
    assert any(name.startswith("private.") and v.numel() >= 500 for name, v in drawn.items())
    again, other_step = noise(), noise(step=1)
    secret = [noise(noise_seed=None) for _ in range(2)]
    for name, values in drawn.items():
        assert values.equal(again[name])
        assert not values.equal(other_step[name])
        assert not values[0].equal(values[1])
        assert not secret[0][name].equal(secret[1][name])


@pytest.mark.parametrize("clip_norm", [0.3, 1e6])
def test_a_round_is_plain_training_with_clipped_sums(clip: FrozenCLIP, clip_norm: float) -> None:
    """Steps divide by the expected batch size, also where the last batch of an epoch is smaller."""
    method = twins.build(clip, "promptfl", context_tokens=2)
    start, training = method.init_shared(1), twins.config()
    data = twins.clients(clip)
    results = train_clients(
        method, [start] * 3, [{}] * 3, data, training, seed=twins.SEED, server_round=2,
        rounds=twins.ROUNDS, privacy=replace(QUIET, image_noise=1e-12, image_clip=clip_norm),
    )  # fmt: skip
    for client, result in zip(data, results, strict=True):
        # 7, 5 and 6 images in batches of 3 are 3, 2 and 2 steps.
        expected = {7: 7 / 3, 5: 5 / 2, 6: 6 / 2}[len(client)]
        assert expected_size(len(client), training) == expected

        def step(
            prompt: Tensor, features: Tensor, labels: Tensor, size: float = expected
        ) -> Tensor:
            total = torch.zeros_like(prompt)
            for i in range(len(labels)):
                one = slice(i, i + 1)
                gradient = twins.ce_gradient(clip, prompt, features[one], labels[one])
                total += gradient * min(1.0, clip_norm / float(gradient.norm()))
            return total / size

        theirs = twins.local_sgd(client, training, 2, start["ctx"], step)
        twins.near(result.shared["ctx"], theirs, start["ctx"])
        assert result.num_examples == len(client)


def test_a_client_has_the_same_result_in_any_block(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "promptfl", context_tokens=2)
    start, data = method.init_shared(1), twins.clients(clip)

    def run(clients: list[ClientData], sampling: Any) -> list[Tensor]:
        privacy = PrivacyConfig(image_noise=0.5, image_sampling=sampling, noise_seed=3)
        many = len(clients)
        results = train_clients(
            method, [start] * many, [{}] * many, clients, twins.config(), seed=1, server_round=1,
            rounds=3, privacy=privacy,
        )  # fmt: skip
        return [r.shared["ctx"] for r in results]

    for sampling in ("shuffled", "poisson"):
        together = run(data, sampling)
        alone = [run([client], sampling)[0] for client in data]
        for ours, theirs in zip(together, alone, strict=True):
            twins.near(ours, theirs, start["ctx"])


def test_poisson_batches_are_independent_draws_of_every_image() -> None:
    data = [
        ClientData(k, Inputs(torch.zeros(views * n, 2)), torch.zeros(n, dtype=torch.int64), views)
        for k, (n, views) in enumerate(((95, 1), (30, 2)))
    ]
    training = TrainingConfig(batch_size=10, local_epochs=40)
    schedule = draw_poisson(data, training, 5, 1)
    steps = (400, 120)
    assert schedule.segments == ((0, 120, 2), (120, 400, 1))
    offset = 0
    for k, client in enumerate(data):
        n = len(client)
        mask_SB = schedule.mask_SKB[: steps[k], k]
        rows = schedule.index_SKB[: steps[k], k][mask_SB] - offset
        assert int(rows.min()) >= 0
        assert int(rows.max()) < n * client.views
        # Each image is in a tenth (a third) of the steps; five standard deviations.
        probability = expected_size(n, training) / n
        assert probability == pytest.approx((0.1, 1 / 3)[k])
        counts = np.bincount(rows.numpy() % n, minlength=n)
        spread = (steps[k] * probability * (1 - probability)) ** 0.5
        assert abs(counts - steps[k] * probability).max() < 5 * spread
        assert mask_SB.sum(1).unique().numel() > 5, "batches differ in size"
        if client.views > 1:
            assert 0.4 < float((rows >= n).double().mean()) < 0.6
            second = schedule.second_SKB[: steps[k], k][mask_SB] - offset
            assert ((rows - second).abs() == n).all(), "the other view of the same image"
        offset += n * client.views
    again, other = draw_poisson(data, training, 5, 1), draw_poisson(data, training, 5, 2)
    assert schedule.index_SKB.equal(again.index_SKB)
    assert not torch.equal(schedule.index_SKB, other.index_SKB)
    secret = draw_poisson(data, training, None, 1)
    assert not torch.equal(schedule.index_SKB, secret.index_SKB)
