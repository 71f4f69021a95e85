"""A method that supports `privacy.image_noise` lets out nothing else of an image."""

from __future__ import annotations

import pytest
import torch

from fedprompt import training
from fedprompt.config.protection import PrivacyConfig
from fedprompt.config.schema import TrainingConfig
from fedprompt.data.dataset import ImageDataset
from fedprompt.data.features.table import FeatureTable
from fedprompt.methods.base import Method, takes_steps
from fedprompt.methods.method_config import allows_image_noise
from fedprompt.methods.parts.wrapper import WrappedMethod
from fedprompt.training import train_clients
from tests.support.method_contract import assert_close, clients, starts

CACHED = {"features", "patches", "local", "routing"}
"""What a step reads of an image without a pass through the image tower."""


@pytest.fixture
def supporting(method: Method) -> Method:
    if not allows_image_noise(method.config):
        pytest.skip(f"{method.name} does not support privacy.image_noise")
    return method


def test_its_gradient_is_the_mean_over_images_of_each_ones_own(
    supporting: Method,
    columns: FeatureTable,
    dataset: ImageDataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    method = supporting
    assert method.needs | method.needs_to_train <= CACHED
    plain = WrappedMethod if isinstance(method, WrappedMethod) else Method
    if not takes_steps(method):
        assert type(method).noisy_from_data is not Method.noisy_from_data
        return
    for member in ("gradients", "shared_from_data", "init_private_from_data"):
        assert getattr(type(method), member) is getattr(plain, member), member
    data = clients(columns, dataset)[1:2]  # full batches
    received, private = starts(method, data)
    config = TrainingConfig(lr=0.01, batch_size=4, weight_decay=0.0)

    def trained(privacy: PrivacyConfig | None) -> training.LocalResult:
        (result,) = train_clients(
            method, received, private, data, config, seed=1, server_round=1, rounds=10, max_steps=1,
            privacy=privacy,
        )  # fmt: skip
        return result

    # So little noise, and so wide a clip, that nothing remains but the sum over images.
    quiet = PrivacyConfig(image_noise=1e-13, image_clip=1e4, noise_seed=1)
    usual, ours = trained(None), trained(quiet)
    assert_close(ours.shared, usual.shared, received[0], rtol=1e-3)
    assert_close(ours.private, usual.private, private[0], rtol=1e-3)
    # How many images a client has of each class is neither uploaded nor trained on.
    monkeypatch.setattr(
        training, "_class_counts", lambda data, classes: torch.full((len(data), classes), 7)
    )
    other = trained(quiet)
    assert all(other.shared[n].equal(t) for n, t in ours.shared.items())
    assert all(other.private[n].equal(t) for n, t in ours.private.items())
