"""AFL is ridge regression on all images, whatever the partition, the clients and their order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import shape_only_clip
from fedprompt.config.schema import TrainingConfig
from fedprompt.data.features.inputs import Inputs
from fedprompt.data.features.table import FeatureTable
from fedprompt.data.partition import make_partition
from fedprompt.federation.server_app import Federation
from fedprompt.methods.afl import AFL, GRAM, TARGETS, ridge_solution
from fedprompt.methods.base import ClientData, Task, Tensors, stack, uploaded_numbers
from fedprompt.methods.parts.float_pairs import joined
from fedprompt.privacy.local_noise import protected
from fedprompt.simulation.inline_grid import InlineGrid
from fedprompt.training import train_clients
from fedprompt.workspace import Workspace
from tests.support import twins
from tests.support.builders import CLASS_NAMES, fake_dataset, small_config
from tests.support.method_contract import Server

RIDGE = 1e-3
IMAGES = 1500


@pytest.fixture(scope="module")
def features() -> Tensor:
    """Unit vectors of 32 numbers with a common mean, as CLIP's are."""
    return F.normalize(twins.draw(IMAGES, 32) + 2 * twins.draw(32, seed=1), dim=-1)


@pytest.fixture(scope="module")
def labels() -> Tensor:
    return torch.from_numpy(fake_dataset(IMAGES).labels_N)


def centralised(features_ND: Tensor, labels_N: Tensor) -> np.ndarray[Any, Any]:
    """scikit-learn's own solution (C, D), float64."""
    x_ND = features_ND.double().numpy()
    y_NC = np.eye(len(CLASS_NAMES))[labels_N.numpy()]
    regression = Ridge(alpha=RIDGE * len(x_ND), fit_intercept=False, solver="svd")
    return np.asarray(regression.fit(x_ND, y_NC).coef_)


def classifier(shared: Tensors) -> np.ndarray[Any, Any]:
    return ridge_solution(joined(shared, GRAM), joined(shared, TARGETS), RIDGE).numpy()


def assert_same(ours: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any]) -> None:
    assert np.abs(theirs).max() > 0.05
    assert np.abs(ours - theirs).max() <= 1e-8


def one_round(clip: FrozenCLIP, data: Sequence[ClientData], **options: Any) -> Tensors:
    """The shared tensors after a round of some clients, in the order given."""
    method = twins.build(clip, "afl", ridge=RIDGE, **options)
    server = Server(method, data)
    results = train_clients(
        method, server.send(1, data), [{} for _ in data], data, TrainingConfig(), seed=1,
        server_round=1, rounds=1,
    )  # fmt: skip
    assert not any(r.losses for r in results)
    server.collect(1, results)
    return {n: torch.as_tensor(a) for n, a in server.shared.items()}


@pytest.mark.parametrize("clients", [1, 10, 1000])
@pytest.mark.parametrize("order", [0, 1])
def test_any_number_of_clients_in_any_order(
    clip: FrozenCLIP, features: Tensor, labels: Tensor, clients: int, order: int
) -> None:
    draw = np.random.default_rng(order)
    # Every client has an image; beyond that, the sizes are as unequal as chance makes them.
    owner_N = np.concatenate([np.arange(clients), draw.integers(0, clients, IMAGES - clients)])
    data = []
    for client in draw.permutation(clients):
        rows = torch.from_numpy(draw.permutation(np.flatnonzero(owner_N == client)))
        data.append(ClientData(int(client), Inputs(features[rows]), labels[rows]))
    assert_same(classifier(one_round(clip, data)), centralised(features, labels))


@pytest.mark.parametrize(
    "partition",
    [
        {"scheme": "iid", "clients": 3},
        {"scheme": "dirichlet", "alpha": 0.1, "clients": 20},
        {"scheme": "pathological", "clients": 12, "classes_per_client": 2},
        {"scheme": "domain", "clients": 4},
        {"scheme": "iid", "clients": 5, "shots": 4},
    ],
    ids=lambda p: f"{p['scheme']}-{p['clients']}",
)
def test_a_federation_of_any_scheme(
    clip: FrozenCLIP, features: Tensor, partition: dict[str, Any]
) -> None:
    """From the partition over messages to the server: every client's images, each of them once."""
    workspace = workspace_of(clip, features, partition=partition)
    federation = Federation(workspace, InlineGrid(workspace))
    federation.join()
    line = federation.train_round(1)
    assert (line["train"], line["client_steps"]) == (None, 0)
    data = [workspace.train_data(k) for k in range(workspace.num_clients)]
    expected = centralised(
        torch.cat([d.inputs.features for d in data]), torch.cat([d.labels_N for d in data])
    )
    shared = federation.shared
    assert_same(classifier(shared), expected)
    encoded = workspace.method.encode(stack([shared]), None)
    twins.close(encoded["classes"][0], torch.from_numpy(expected).float(), rtol=1e-6)


def workspace_of(clip: FrozenCLIP, features: Tensor, **sections: Any) -> Workspace:
    dataset = fake_dataset(IMAGES)
    config = small_config(
        **{"method": {"name": "afl", "ridge": RIDGE}, "strategy": {"name": "auto"}, **sections}
    )
    partition = make_partition(dataset, config.partition, config.seed)
    return Workspace(config, clip, dataset, partition, [FeatureTable(features.numpy())])


def test_views_count_as_images(clip: FrozenCLIP, features: Tensor, labels: Tensor) -> None:
    data = ClientData(0, Inputs(features[:40]), labels[:20], views=2)
    expected = centralised(features[:40], labels[:20].repeat(2))
    assert_same(classifier(one_round(clip, [data])), expected)


def test_single_precision_is_near_and_sends_half(
    clip: FrozenCLIP, features: Tensor, labels: Tensor
) -> None:
    data = [ClientData(k, Inputs(features[k::4]), labels[k::4]) for k in range(4)]
    shared = one_round(clip, data, precision="single")
    expected = centralised(features, labels)
    assert set(shared) == {GRAM, TARGETS}
    gap = np.abs(classifier(shared) - expected).max()
    assert 1e-8 < gap < 1e-3 * np.abs(expected).max()


def test_masked_sums_give_the_classifier(clip: FrozenCLIP, features: Tensor) -> None:
    """Secure aggregation rounds every number, so that it is near and not equal."""
    on = {"enabled": True, "max_weight": 1000}
    both = []
    for masked in ({}, {"secure_aggregation": on}):
        workspace = workspace_of(clip, features, partition={"clients": 3, "alpha": 1.0}, **masked)
        federation = Federation(workspace, InlineGrid(workspace))
        federation.join()
        line = federation.train_round(1)
        assert line["clients"]["accepted"] == 3
        both.append(classifier(federation.shared))
    assert 0 < np.abs(both[1] - both[0]).max() < 1e-2 * np.abs(both[0]).max()


def test_no_upload_is_clipped_at_the_square_root_of_2_and_noise_leaves_a_solution(
    clip: FrozenCLIP, features: Tensor, labels: Tensor
) -> None:
    method = twins.build(clip, "afl", precision="single")
    start = method.init_shared(1)
    one_class = ClientData(0, Inputs(features[:1].repeat(9, 1)), labels[:1].repeat(9))
    for data in (one_class, ClientData(0, Inputs(features), labels)):
        sent = method.shared_from_data(data)
        norm = torch.cat([t.flatten() for t in sent.values()]).norm()
        assert norm <= 2**0.5
    config = small_config(privacy={"noise": 1.0, "clip": 2**0.5, "noise_seed": 1}).privacy
    noisy = protected(start, sent, config, server_round=1, client=0)
    solution = ridge_solution(joined(noisy, GRAM), joined(noisy, TARGETS), RIDGE)
    # The largest that moments without negative eigenvalues allow.
    assert solution.norm(dim=1).max() <= joined(noisy, TARGETS).norm(dim=1).max() / RIDGE


def test_a_personal_model_mixes_the_moments(
    clip: FrozenCLIP, features: Tensor, labels: Tensor
) -> None:
    data = ClientData(0, Inputs(features[:200]), labels[:200])
    shared = one_round(clip, [ClientData(1, Inputs(features[200:]), labels[200:])])
    for mu in (0.25, 0.9):
        method = twins.build(clip, "afl", ridge=RIDGE, personal=mu)
        private = method.init_private_from_data(method.init_private(1, 0), data, 1)
        ours = method.encode(stack([shared]), stack([private]))["classes"][0]
        # Images weighted so that the client's own have the share mu of all.
        weight_N = np.r_[np.full(200, mu / 200), np.full(1300, (1 - mu) / 1300)]
        regression = Ridge(alpha=RIDGE, fit_intercept=False)
        y_NC = np.eye(len(CLASS_NAMES))[labels.numpy()]
        theirs = regression.fit(features.double().numpy(), y_NC, sample_weight=weight_N).coef_
        twins.close(ours, torch.from_numpy(theirs).float(), rtol=1e-5)
    assert not twins.build(clip, "afl").init_private(1, 0)


def test_it_sends_the_triangle_and_the_targets_at_vit_b_16() -> None:
    clip = shape_only_clip("ViT-B-16")
    task = Task(tuple(f"class {c}" for c in range(20)))
    numbers = 512 * 513 // 2 + 20 * 512
    for precision, times in (("single", 1), ("double", 2)):
        described = AFL(AFL.Config(precision=precision), clip, task)
        assert uploaded_numbers(described) == times * numbers
