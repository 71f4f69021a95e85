"""What each scheme promises, on exact or large cases."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedprompt.config.schema import PartitionConfig
from fedprompt.data.dataset import ImageDataset
from fedprompt.data.partition import Partition, dense, describe, make_partition
from fedprompt.data.partition.draws import apportion, draw_counts
from fedprompt.errors import UserError
from tests.support.fake_data import flat_dataset


def deal(dataset: ImageDataset, seed: int = 1, **keys: Any) -> Partition:
    return make_partition(dataset, PartitionConfig(**{"local_test_fraction": 0.0, **keys}), seed)


def counts(dataset: ImageDataset, **keys: Any) -> np.ndarray:
    return deal(dataset, **keys).train_counts(dataset.labels_N, len(dataset.class_names))


def even(classes: int, per_class: int) -> ImageDataset:
    return flat_dataset(np.repeat(np.arange(classes), per_class).tolist())


@pytest.mark.parametrize(("clients", "each"), [(10, 2), (7, 3), (20, 1)])
def test_shards_are_equal_runs_of_sorted_images(clients: int, each: int) -> None:
    dataset = even(10, 42)
    held_KC = counts(dataset, scheme="shards", clients=clients, shards_per_client=each)
    size = 420 / (clients * each)
    assert (np.abs(held_KC.sum(1) - each * size) < each).all()
    # A shard no longer than a class touches two classes at most.
    assert ((held_KC > 0).sum(1) <= 2 * each).all()
    assert (held_KC > 0).sum() <= clients * each + 9


def test_shards_that_are_whole_classes_stay_whole() -> None:
    keys: dict[str, Any] = {"scheme": "shards", "clients": 5, "shards_per_client": 2}
    labels_N = even(10, 20).labels_N
    held_KC = counts(even(10, 20), **keys)
    assert sorted(held_KC.ravel().tolist()) == [0] * 40 + [20] * 10
    assert (held_KC.sum(1) == 40).all()
    shares = {
        tuple((deal(even(10, 20), seed, **keys).train_counts(labels_N, 10) > 0).argmax(0))
        for seed in range(1, 6)
    }
    assert len(shares) == 5  # who gets which shards is drawn


@pytest.mark.parametrize(("classes", "clients"), [(31, 5), (31, 20), (21, 20), (10, 10), (6, 1)])
def test_disjoint_classes_have_one_client_each(classes: int, clients: int) -> None:
    held_KC = counts(even(classes, 6), scheme="disjoint_classes", clients=clients)
    assert ((held_KC > 0).sum(0) == 1).all()
    each = (held_KC > 0).sum(1)
    assert each.min() >= 1
    assert each.max() - each.min() <= 1


def test_quantity_skews_sizes_and_not_labels() -> None:
    dataset = even(4, 1000)
    sizes = {}
    for alpha in (0.3, 1e4):
        held_KC = counts(dataset, scheme="quantity", clients=8, alpha=alpha, min_images=2)
        sizes[alpha] = held_KC.sum(1)
        large = held_KC[held_KC.sum(1) > 400]
        assert (np.abs(large / large.sum(1, keepdims=True) - 0.25) < 0.07).all()
    assert sizes[0.3].max() > 4 * np.median(sizes[0.3])
    assert (np.abs(sizes[1e4] - 500) < 30).all()


def test_power_law_sizes_are_exact() -> None:
    dataset = even(5, 100)
    weights = 1 / np.arange(1, 11)
    wanted = 3 + 470 * weights / weights.sum()
    drawn = []
    for seed in (1, 2):
        partition = deal(dataset, seed, scheme="power_law", clients=10, min_images=3)
        sizes_K = np.diff(partition.train_offsets)
        assert (np.abs(np.sort(sizes_K)[::-1] - wanted) < 1).all()
        drawn.append(sizes_K.tolist())
    assert drawn[0] != drawn[1]  # which client is large depends on the seed
    equal = deal(dataset, scheme="power_law", clients=10, exponent=0.0)
    assert (np.diff(equal.train_offsets) == 50).all()


def domains(sizes: list[int], classes: int = 4) -> ImageDataset:
    owner = np.repeat(np.arange(len(sizes)), sizes)
    return flat_dataset((np.arange(len(owner)) % classes).tolist(), domains=owner.tolist())


def test_clients_in_proportion_to_domains() -> None:
    dataset = domains([90, 30, 10])
    partition = deal(dataset, scheme="domain", clients=6, domain_clients="proportional")
    domain_KD = dense(describe(dataset, partition)["domain_counts"], 3)
    # One each; then three more go where a client holds most: 90, 45 and, at 30 each, the first.
    assert (domain_KD > 0).argmax(1).tolist() == [0, 0, 0, 0, 1, 2]
    assert domain_KD.max(1).tolist() == [23, 22, 23, 22, 30, 10]


@pytest.mark.parametrize("rule", ["equal", "proportional"])
def test_domain_dirichlet_skews_labels_within_one_domain(rule: str) -> None:
    dataset = domains([400, 400, 400])
    skew = {}
    for alpha in (0.1, 1000.0):
        partition = deal(
            dataset, scheme="domain_dirichlet", clients=9, alpha=alpha, domain_clients=rule
        )
        domain_KD = dense(describe(dataset, partition)["domain_counts"], 3)
        assert ((domain_KD > 0).sum(1) == 1).all()
        assert ((domain_KD > 0).sum(0) == 3).all()
        held_KC = partition.train_counts(dataset.labels_N, 4)
        skew[alpha] = (held_KC.max(1) / held_KC.sum(1)).mean()
    assert skew[0.1] > 0.6 > 0.3 > skew[1000.0]


def hundred(per_class: int) -> ImageDataset:
    """A hundred classes in twenty superclasses of five, as in CIFAR-100."""
    dataset = even(100, per_class)
    return replace(dataset, superclass_names=tuple(f"group {c // 5:02d}" for c in range(100)))


def test_superclass_dirichlet_gives_equal_clients_few_superclasses() -> None:
    dataset = hundred(100)
    held_KC = counts(dataset, scheme="superclass_dirichlet", clients=50, alpha=0.1)
    assert (held_KC.sum(1) == 200).all()
    held_KS = held_KC.reshape(50, 20, 5).sum(2)
    assert np.median(held_KS.max(1)) > 80  # of 200 images, where 10 would be even
    # Where a client holds most of a superclass's share, its five classes are spread.
    spread = [held_KC.reshape(50, 20, 5)[k, s] for k, s in enumerate(held_KS.argmax(1))]
    assert np.mean([row.min() > 0 for row in spread[:30]]) > 0.9


def test_superclass_dirichlet_becomes_even() -> None:
    held_KC = counts(
        hundred(100), scheme="superclass_dirichlet", clients=5, alpha=1e5, alpha_within=1e5
    )
    # The first client draws 2,000 times from 100 classes that are all there: 20 each, give or
    # take 4.5 (classes) or 10 (superclasses) from a hundred. The last one gets what is left.
    assert np.abs(held_KC[0] - 20).max() < 20
    assert np.abs(held_KC[0].reshape(20, 5).sum(1) - 100).max() < 40
    assert (held_KC.sum(1) == 2000).all()


def test_superclasses_are_needed() -> None:
    with pytest.raises(UserError, match="whose classes have superclasses"):
        deal(even(4, 10), scheme="superclass_dirichlet", clients=2)


def test_draws_stop_at_what_is_left() -> None:
    rng = np.random.default_rng(0)
    left = np.array([3, 0, 50, 7])
    shares = np.array([0.9, 0.1, 1e-300, 0.0])
    assert draw_counts(rng, 60, shares, left).tolist() == left.tolist()
    taken = sum(
        draw_counts(rng, 10, np.array([0.2, 0.3, 0.5]), np.array([100] * 3)) for _ in range(3000)
    )
    assert np.abs(taken / 30000 - [0.2, 0.3, 0.5]).max() < 0.01


def test_apportion_by_largest_remainders() -> None:
    assert apportion(np.array([0.5, 0.3, 0.2]), 9).tolist() == [4, 3, 2]  # 4.5, 2.7, 1.8
    assert apportion(np.array([1.0, 0.0]), 7).tolist() == [7, 0]
    assert apportion(np.full(3, 1 / 3), 0).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"scheme": "shards", "clients": 8, "shards_per_client": 5},
            "40 shards cannot be cut from",
        ),
        ({"scheme": "disjoint_classes", "clients": 4}, "4 clients cannot each have classes"),
        ({"scheme": "domain_dirichlet", "clients": 1}, "cannot cover 2 domains"),
        (
            {"scheme": "domain_dirichlet", "clients": 8, "min_images": 2},
            "domain 'domain 1' has 6 training images for 4 clients with at least 2",
        ),
        ({"scheme": "shards", "clients": 15, "min_images": 2}, "need 30 training images"),
        ({"scheme": "power_law", "clients": 4, "min_images": 8}, "need 32 training images"),
    ],
)
def test_what_cannot_be_met_is_said_in_one_line(keys: dict[str, Any], message: str) -> None:
    dataset = flat_dataset([0] * 10 + [1] * 10 + [2] * 9, domains=[0] * 23 + [1] * 6)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        deal(dataset, **keys)
    assert "\n" not in str(caught.value)
