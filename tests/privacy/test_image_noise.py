"""Noise on the gradients of single images: what a federation reports, refuses and counts."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fedprompt.config.protection import PrivacyConfig
from fedprompt.config.schema import TrainingConfig
from fedprompt.errors import UserError
from fedprompt.federation.server_app import Federation
from fedprompt.methods.base import Tensors, takes_steps
from fedprompt.privacy.accountant import epsilon
from fedprompt.privacy.image_epsilon import image_epsilon
from fedprompt.simulation.inline_grid import InlineGrid
from fedprompt.simulation.step_memory import step_memory
from fedprompt.workspace import Workspace
from tests.support import twins
from tests.support.builders import small_config

MakeWorkspace = Callable[..., Workspace]
PROMPTFL = {"name": "promptfl", "context_tokens": 2}
NOISE = {"image_noise": 2.0, "image_clip": 0.5, "noise_seed": 1}
needs_accountant = pytest.mark.skipif(
    __import__("importlib.util").util.find_spec("dp_accounting") is None,
    reason="needs the extra 'dp'",
)


def opened(workspace: Workspace) -> Federation:
    federation = Federation(workspace, InlineGrid(workspace))
    federation.join()
    return federation


@needs_accountant
def test_epsilon_is_that_of_the_mechanism_that_draws_the_batches() -> None:
    from dp_accounting import dp_event
    from dp_accounting.rdp import RdpAccountant

    training = TrainingConfig(batch_size=10, local_epochs=2)
    images = {0: 100, 1: 55, 2: 10}.__getitem__

    def spent(rounds: dict[int, int], steps: bool = True, **changes: Any) -> float:
        found = image_epsilon(
            PrivacyConfig(image_noise=1.5, **changes), training, rounds, images, steps=steps
        )
        assert found is not None
        return found

    # An image is in one step of each epoch, whatever the number of images.
    assert spent({0: 3, 1: 5, 2: 4}) == epsilon(1.5, 10, 1e-5)
    # Without steps, sums are released once in a round.
    assert spent({0: 3}, steps=False) == epsilon(1.5, 3, 1e-5)
    assert spent({}) == 0
    # Ten batches, and each image in a tenth of the 3 x 2 x 10 steps.
    accountant = RdpAccountant()
    event = dp_event.PoissonSampledDpEvent(0.1, dp_event.GaussianDpEvent(1.5))
    accountant.compose(event, 60)
    sampled = spent({0: 3}, image_sampling="poisson")
    assert accountant.get_epsilon(1e-5) <= sampled < 1.02 * accountant.get_epsilon(1e-5)
    assert sampled < epsilon(1.5, 6, 1e-5)  # type: ignore[operator]
    # The client with one batch has no amplification, and so the largest epsilon.
    assert spent({0: 3, 1: 3, 2: 3}, image_sampling="poisson") == epsilon(1.5, 6, 1e-5)


@needs_accountant
def test_a_run_reports_epsilon_and_no_losses(make_workspace: MakeWorkspace) -> None:
    workspace = make_workspace(method=PROMPTFL, privacy=NOISE, federation={"fraction": 0.5})
    federation = opened(workspace)
    for server_round in (1, 2, 3):
        line = federation.train_round(server_round)
        assert line["train"] is None
        assert line["clients"]["accepted"] == 2
    asked = max(federation.asked.values())
    assert asked < 3
    assert line["privacy"] == {"image_epsilon": epsilon(2.0, asked, 1e-5), "delta": 1e-5}
    # A round that a crash makes a run repeat is paid for again.
    federation.train_round(3)
    repeated = max(federation.releases.by_client("clients").values())
    assert repeated == max(federation.asked.values()) > asked


@needs_accountant
def test_both_kinds_of_noise_and_masks_work_together(make_workspace: MakeWorkspace) -> None:
    line = opened(make_workspace(method=PROMPTFL, privacy={**NOISE, "noise": 1.0})).train_round(1)
    assert line["privacy"] == {
        "epsilon": epsilon(0.5, 1, 1e-5), "image_epsilon": epsilon(2.0, 1, 1e-5), "delta": 1e-5
    }  # fmt: skip
    shared = []
    for masked in (False, True):
        workspace = make_workspace(
            method=PROMPTFL, privacy=NOISE, secure_aggregation={"enabled": masked}
        )
        federation = opened(workspace)
        assert federation.train_round(1)["clients"]["accepted"] == 4
        shared.append(federation.shared["ctx"])
    assert float((shared[0] - shared[1]).abs().max()) < 1e-5
    strategy = {"name": "dp_fedavg", "noise": 1.0, "noise_seed": 1}
    line = opened(make_workspace(method=PROMPTFL, privacy=NOISE, strategy=strategy)).train_round(1)
    assert line["strategy"]["epsilon"] == epsilon(1.0, 1, 1e-5)
    assert line["privacy"]["image_epsilon"] == epsilon(2.0, 1, 1e-5)


@needs_accountant
def test_the_sums_of_afl_get_noise_of_their_sensitivity(make_workspace: MakeWorkspace) -> None:
    method = twins.build(make_workspace(method=PROMPTFL).clip, "afl", precision="single")
    data = twins.clients(method.clip)[0]

    def sums(noise: float, count: int) -> torch.Tensor:
        own = type(data)(0, data.inputs[:count], data.labels_N[:count])
        draw = np.random.default_rng(0)
        sent = method.noisy_from_data(
            own, lambda shape: torch.from_numpy(noise * draw.standard_normal(shape))
        )
        return whole(sent)

    def whole(sent: Tensors) -> torch.Tensor:
        rows, columns = torch.triu_indices(*2 * [method.clip.embed_dim])
        # A symmetric matrix has every number above its diagonal twice.
        gram_T = sent["gram"].double() * torch.where(rows == columns, 1.0, 2**0.5)
        return torch.cat([gram_T, sent["targets"].double().flatten()])

    many = len(data)
    plain = sums(0, many)
    assert plain.equal(whole(method.shared_from_data(data)))
    # Without its last image, the sum over the same number of images.
    change = (plain - sums(0, many - 1) * (many - 1) / many).norm()
    assert float(change) == pytest.approx(2**0.5 / many, rel=1e-5)
    noise = sums(3.0, many) - plain
    tolerance = 4 / (2 * len(noise)) ** 0.5
    assert float(noise.std()) == pytest.approx(3 * 2**0.5 / many, rel=tolerance)

    workspace = make_workspace(
        method={"name": "afl"}, strategy={"name": "auto"}, privacy=NOISE, federation={"rounds": 1}
    )
    assert not takes_steps(workspace.method)
    federation = opened(workspace)
    line = federation.train_round(1)
    assert line["privacy"]["image_epsilon"] == epsilon(2.0, 1, 1e-5)
    with_noise = federation.shared["gram"]
    again = opened(workspace)
    again.train_round(1)
    assert with_noise.equal(again.shared["gram"]), "the seed fixes the noise"


def refusal(**sections: Any) -> str:
    with pytest.raises(UserError) as caught:
        small_config(**sections)
    return str(caught.value)


@pytest.mark.parametrize(
    "method",
    [
        {"name": "fedrsclip"},  # CMFA contrasts the images of a batch
        {"name": "palm"},  # uploads the share of each class
        {"name": "dp_fpl"},  # clips the mean of a batch
        {"name": "tip_adapter"},  # keeps images
        {"name": "lora", "image_layers": 1},
        {"name": "fedprox", "base": "fedclip"},
    ],
    ids=lambda m: m["name"],
)
def test_methods_that_let_out_more_of_an_image_are_refused(method: dict[str, Any]) -> None:
    text = refusal(method=method, privacy=NOISE)
    assert method["name"] in text
    assert "privacy.image_noise" in text
    assert "promptfl" in text


def test_what_cannot_be_accounted_is_refused() -> None:
    small_config(method={"name": "fedrsclip", "cmfa": "cosine"}, privacy=NOISE)
    small_config(method={"name": "fedprox", "base": "fedsept"}, privacy=NOISE)
    labels = {"labels_per_round": 2, "active_rounds": 3}
    assert "labels_per_round" in refusal(method=PROMPTFL, privacy=NOISE, partition=labels)
    both: dict[str, Any] = {"clock": {"enabled": True}, "asynchronous": {"enabled": True}}
    assert "asynchronous" in refusal(method=PROMPTFL, privacy=NOISE, **both)
    assert "image_clip" in refusal(privacy={"image_clip": 0})


def test_image_noise_without_an_accountant_is_refused_at_once(
    make_workspace: MakeWorkspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = make_workspace(method=PROMPTFL, privacy=NOISE)
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(UserError, match=r"fedprompt\[dp\]"):
        Federation(workspace, InlineGrid(workspace))


def test_the_estimated_memory_holds_one_image_at_a_time(make_workspace: MakeWorkspace) -> None:
    plain, noisy = (
        step_memory(make_workspace(method=PROMPTFL, privacy=privacy)) for privacy in ({}, NOISE)
    )
    assert plain is not None
    assert noisy is not None
    assert noisy.kept_by_images < plain.kept_by_images
    assert noisy.tensors > plain.tensors
    assert math.isfinite(noisy.training)
