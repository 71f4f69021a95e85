from __future__ import annotations

import dataclasses
import json
import warnings
from dataclasses import replace
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprompt.config.schema import PartitionConfig
from fedprompt.data.dataset import TEST, TRAIN, ImageDataset
from fedprompt.data.partition import (
    NOBODY,
    SERVER,
    Partition,
    dense,
    describe,
    make_partition,
    sparse,
)
from fedprompt.data.partition.schemes import SCHEMES
from fedprompt.errors import UserError
from fedprompt.rng import derive_seed, generator
from tests.support.fake_data import flat_dataset


def balanced(classes: int, per_class: int, domains: int = 2, test_every: int = 4) -> ImageDataset:
    labels = np.repeat(np.arange(classes), per_class)
    dataset = flat_dataset(
        labels.tolist(),
        domains=(np.arange(len(labels)) % domains).tolist(),
        test=range(0, len(labels), test_every),
    )
    return with_superclasses(dataset)


def with_superclasses(dataset: ImageDataset) -> ImageDataset:
    """Classes 0 and 2, 4, ... under one superclass, the others under another."""
    groups = tuple(("even", "odd")[label % 2] for label in range(len(dataset.class_names)))
    return replace(dataset, superclass_names=groups)


def owners(dataset: ImageDataset, partition: Partition) -> np.ndarray:
    """Client of every image, -1 for the server's; fails on an image that is held twice."""
    owner_N = np.full(len(dataset), -1)
    for client in range(partition.num_clients):
        for index in (*partition.train(client), *partition.test(client)):
            assert owner_N[index] == -1, f"image {index} is held twice"
            owner_N[index] = client
    return owner_N


@st.composite
def settings_of(draw: Any) -> tuple[ImageDataset, PartitionConfig, int]:
    classes = draw(st.integers(2, 6))
    sizes = draw(st.lists(st.integers(12, 40), min_size=classes, max_size=classes))
    labels = np.repeat(np.arange(classes), sizes)
    domains = draw(st.integers(2, 3))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    dataset = flat_dataset(
        rng.permutation(labels).tolist(),
        domains=rng.permutation(np.arange(len(labels)) % domains).tolist(),
        test=rng.choice(len(labels), len(labels) // 5, replace=False).tolist(),
    )
    config = PartitionConfig(
        scheme=(scheme := draw(st.sampled_from(list(SCHEMES)))),
        clients=draw(st.integers(1 if scheme == "disjoint_classes" else 3, classes))
        if scheme == "disjoint_classes"
        else draw(st.integers(3, 6)),
        alpha=draw(st.sampled_from([1e-3, 0.1, 1.0, 100.0])),
        classes_per_client=2,
        shards_per_client=draw(st.integers(1, 3)),
        exponent=draw(st.sampled_from([0.0, 1.0, 3.0])),
        domain_clients=draw(st.sampled_from(["equal", "proportional"])),
        min_images=draw(st.integers(1, 2)),
        local_test_fraction=draw(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9])),
    )
    return with_superclasses(dataset), config, draw(st.integers(0, 2**31))


@settings(max_examples=250, deadline=None, derandomize=True)
@given(settings_of())
def test_every_training_image_has_exactly_one_client(
    case: tuple[ImageDataset, PartitionConfig, int],
) -> None:
    dataset, config, seed = case
    partition = make_partition(dataset, config, seed)
    owner_N = owners(dataset, partition)
    assert ((owner_N >= 0) == (dataset.split_N == TRAIN)).all()
    assert set(partition.server_test) == set(np.flatnonzero(dataset.split_N != TRAIN))
    held_K = np.bincount(owner_N[owner_N >= 0], minlength=config.clients)
    assert held_K.min() >= config.min_images
    again = make_partition(dataset, config, seed)
    assert (again.train_flat == partition.train_flat).all()
    assert (again.train_offsets == partition.train_offsets).all()
    assert (again.test_flat == partition.test_flat).all()


@settings(max_examples=250, deadline=None, derandomize=True)
@given(settings_of())
def test_local_test_follows_local_train(case: tuple[ImageDataset, PartitionConfig, int]) -> None:
    dataset, config, seed = case
    partition = make_partition(dataset, config, seed)
    num_classes, fraction = len(dataset.class_names), config.local_test_fraction
    train_KC = partition.train_counts(dataset.labels_N, num_classes)
    test_KC = partition.test_counts(dataset.labels_N, num_classes)
    held_KC = train_KC + test_KC
    assert (train_KC[held_KC > 0] >= 1).all()  # so a client's every tested class is trained on
    assert (np.abs(test_KC - fraction * held_KC) < 1)[held_KC > 1].all()
    assert (test_KC[held_KC == 1] == 0).all()
    # The share is right for the client as a whole wherever its classes have images to give.
    wanted_K = np.floor(fraction * held_KC.sum(1) + 0.5)
    giving_KC = np.minimum(np.floor(fraction * held_KC + 1 - 1e-9), np.maximum(held_KC - 1, 0))
    assert (test_KC.sum(1) == np.minimum(wanted_K, giving_KC.sum(1))).all()


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_another_seed_gives_another_partition(scheme: str) -> None:
    dataset = balanced(4, 30)
    config = PartitionConfig(scheme=scheme, clients=4, alpha=1.0)
    one, two = (owners(dataset, make_partition(dataset, config, seed)) for seed in (1, 2))
    assert (one != two).mean() > 0.2


def test_iid_is_even_and_mixed() -> None:
    dataset = balanced(3, 40, test_every=1000)  # 119 training images, stored class by class
    config = PartitionConfig(scheme="iid", clients=4, local_test_fraction=0.0)
    partition = make_partition(dataset, config, 1)
    assert sorted(np.diff(partition.train_offsets)) == [29, 30, 30, 30]
    assert partition.train_counts(dataset.labels_N, 3).min() >= 4


def test_dirichlet_equals_flwr_datasets_on_the_same_shuffled_images() -> None:
    import datasets
    from flwr_datasets.partitioner import DirichletPartitioner

    dataset = balanced(5, 60)
    config = PartitionConfig(scheme="dirichlet", clients=7, alpha=0.5, min_images=2)
    ours = owners(dataset, make_partition(dataset, config, 3))
    train_T = np.flatnonzero(dataset.split_N == TRAIN)
    shuffled = train_T[generator(3, "partition", "order").permutation(len(train_T))]
    reference = DirichletPartitioner(
        num_partitions=7,
        partition_by="label",
        alpha=0.5,
        min_partition_size=2,
        self_balancing=False,
        shuffle=False,
        seed=derive_seed(3, "partition", "dirichlet"),
    )
    reference.dataset = datasets.Dataset.from_dict(
        {"label": dataset.labels_N[shuffled], "image": shuffled}
    )
    theirs = np.full(len(dataset), -1)
    for client in range(7):
        theirs[reference.load_partition(client).with_format("numpy")[:]["image"]] = client
    assert (ours == theirs).all()


def test_dirichlet_redraws_as_flwr_datasets_does() -> None:
    import datasets
    from flwr_datasets.partitioner import DirichletPartitioner

    dataset = balanced(2, 60, test_every=1000)
    config = PartitionConfig(
        scheme="dirichlet", clients=3, alpha=0.4, min_images=12, local_test_fraction=0.0
    )
    for seed in range(40):  # find a seed whose first draw is refused and whose later one is not
        reference = DirichletPartitioner(
            num_partitions=3,
            partition_by="label",
            alpha=0.4,
            min_partition_size=12,
            self_balancing=False,
            shuffle=False,
            seed=derive_seed(seed, "partition", "dirichlet"),
        )
        train_T = np.flatnonzero(dataset.split_N == TRAIN)
        reference.dataset = datasets.Dataset.from_dict({"label": dataset.labels_N[train_T]})
        with warnings.catch_warnings(record=True) as redraws:
            warnings.simplefilter("always")
            theirs = [len(reference.load_partition(client)) for client in range(3)]
        if redraws:
            break
    assert redraws
    assert np.diff(make_partition(dataset, config, seed).train_offsets).tolist() == theirs


def test_smaller_alpha_is_more_skewed() -> None:
    dataset = balanced(10, 100)
    largest = {}
    for alpha in (0.05, 1.0, 1000.0):
        config = PartitionConfig(scheme="dirichlet", clients=5, alpha=alpha)
        counts_KC = make_partition(dataset, config, 1).train_counts(dataset.labels_N, 10)
        largest[alpha] = (counts_KC.max(0) / counts_KC.sum(0)).mean()
    assert largest[0.05] > 0.75 > largest[1.0] > 0.35 > 0.25 > largest[1000.0]


def test_a_thousand_clients_at_alpha_a_tenth_are_topped_up(
    caplog: pytest.LogCaptureFixture,
) -> None:
    dataset = balanced(10, 400)
    config = PartitionConfig(
        scheme="dirichlet", clients=1000, min_images=2, local_test_fraction=0.0
    )
    partition = make_partition(dataset, config, 1)
    assert (owners(dataset, partition) >= 0).sum() == 3000
    assert np.diff(partition.train_offsets).min() == 2
    assert "images were moved to them" in caplog.text


@pytest.mark.parametrize(("clients", "each"), [(5, 2), (7, 3), (10, 1), (4, 10)])
def test_pathological_gives_each_client_exactly_its_classes(clients: int, each: int) -> None:
    dataset = balanced(10, 40)
    config = PartitionConfig(
        scheme="pathological",
        clients=clients,
        classes_per_client=each,
        local_test_fraction=0.0,
    )
    counts_KC = make_partition(dataset, config, 1).train_counts(dataset.labels_N, 10)
    assert ((counts_KC > 0).sum(1) == each).all()
    owners_C = (counts_KC > 0).sum(0)
    assert owners_C.min() >= 1
    assert owners_C.max() - owners_C.min() <= 1
    for label in range(10):
        shares = counts_KC[counts_KC[:, label] > 0, label]
        assert shares.max() - shares.min() <= 1


def test_domain_clients_hold_one_domain_in_turn() -> None:
    dataset = balanced(3, 40, domains=3)
    config = PartitionConfig(scheme="domain", clients=7)
    domain_KD = dense(describe(dataset, make_partition(dataset, config, 1))["domain_counts"], 3)
    assert ((domain_KD > 0) == (np.arange(7)[:, None] % 3 == np.arange(3))).all()
    assert domain_KD.sum(1).tolist() == [10, 15, 15, 10, 15, 15, 10]


def test_shots_keep_that_many_per_class_and_leave_local_test_alone() -> None:
    dataset = balanced(4, 60)
    full = PartitionConfig(scheme="dirichlet", clients=4, alpha=1.0)
    few = PartitionConfig(scheme="dirichlet", clients=4, alpha=1.0, shots=3)
    one, two = make_partition(dataset, full, 1), make_partition(dataset, few, 1)
    full_KC = one.train_counts(dataset.labels_N, 4)
    assert (two.train_counts(dataset.labels_N, 4) == np.minimum(full_KC, 3)).all()
    assert (two.test_flat == one.test_flat).all()
    for client in range(4):
        assert set(two.train(client)) <= set(one.train(client))


def test_exact_local_split_of_one_client() -> None:
    # 10, 5, 2 and 1 images at 0.25: floors 2, 1, 0, 0, and round(4.5) = 5 in all; the two
    # missing ones come from the largest remainders that can give: 0.5 (10), 0.5 (2).
    dataset = flat_dataset([0] * 10 + [1] * 5 + [2] * 2 + [3])
    config = PartitionConfig(scheme="iid", clients=1, local_test_fraction=0.25)
    partition = make_partition(dataset, config, 1)
    assert partition.test_counts(dataset.labels_N, 4).tolist() == [[3, 1, 1, 0]]
    assert partition.train_counts(dataset.labels_N, 4).tolist() == [[7, 4, 1, 1]]


def test_describe_is_json_and_counts_right() -> None:
    dataset = flat_dataset([0, 0, 1, 1, 0, 1], domains=[0, 1, 0, 1, 0, 0], test=[4, 5])
    config = PartitionConfig(scheme="domain", clients=2, local_test_fraction=0.0)
    described = describe(dataset, make_partition(dataset, config, 1))
    assert json.loads(json.dumps(described)) == {
        "class_names": ["class 0", "class 1"],
        "domain_names": ["domain 0", "domain 1"],
        "train_counts": [[0, 1, 1, 1], [0, 1, 1, 1]],
        "test_counts": [[], []],
        "domain_counts": [[0, 2], [1, 2]],
        "server_test_counts": [1, 1],
        "unlabelled_clients": [],
    }


@pytest.mark.parametrize(
    "counts", [[[0, 3], [2, 0], [0, 0]], [[0, 0]], [[1, 2], [3, 4]]], ids=["gaps", "none", "full"]
)
def test_sparse_rows_come_back_dense(counts: list[list[int]]) -> None:
    rows = sparse(np.array(counts))
    assert [len(row) for row in rows] == [2 * sum(c > 0 for c in row) for row in counts]
    assert dense(rows, 2).tolist() == counts
    assert dense([], 2).shape == (0, 2)
    for wrong in ([[0]], [[2, 1]], [[-1, 1]]):
        with pytest.raises(ValueError, match="pairs"):
            dense(wrong, 2)


def test_every_scheme_of_the_config_is_there_and_no_other() -> None:
    assert get_args(get_type_hints(PartitionConfig)["scheme"]) == tuple(SCHEMES)


def test_an_image_has_one_holder() -> None:
    holders = np.array([0, 1, SERVER, NOBODY, 0, 1])
    parts = np.array([TRAIN, TEST, TEST, TRAIN, TEST, TRAIN], dtype=np.int8)
    partition = Partition.of_holders(holders, parts, 2)
    assert [partition.train(k).tolist() for k in range(2)] == [[0], [5]]
    assert [partition.test(k).tolist() for k in range(2)] == [[4], [1]]
    assert partition.server_test.tolist() == [2]
    fields = {f.name: getattr(partition, f.name) for f in dataclasses.fields(partition)}
    for name in ("train_flat", "test_flat", "validation_flat", "server_test", "server_validation"):
        for held in (0, 1, 2):
            twice = np.append(fields[name], held)
            with pytest.raises(ValueError, match="held twice"):
                Partition(**fields | {name: twice})


def test_indices_are_ascending_and_cannot_be_changed() -> None:
    dataset = balanced(4, 30)
    partition = make_partition(dataset, PartitionConfig(scheme="iid", clients=3), 1)
    for client in range(3):
        assert (np.diff(partition.train(client)) > 0).all()
    with pytest.raises(ValueError, match="read-only"):
        partition.train(0)[0] = 7


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"clients": 31}, "31 clients cannot share 30 training images"),
        ({"clients": 10, "min_images": 4}, "need 40 training images, there are 30"),
        ({"scheme": "pathological", "classes_per_client": 4}, "has 3 classes"),
        ({"scheme": "pathological", "clients": 2, "classes_per_client": 1}, "cannot hold all 3"),
        (
            {"scheme": "pathological", "clients": 14, "min_images": 1},
            "class 'class 1' has 4 training images for 9 clients",
        ),
        (
            {"scheme": "pathological", "clients": 9, "classes_per_client": 1},
            r"leaves client \d+ 1 of 30 training images, partition.min_images asks for 2",
        ),
        ({"scheme": "domain", "clients": 1}, "cannot cover 2 domains"),
    ],
)
def test_what_cannot_be_met_is_said_in_one_line(config: dict[str, Any], message: str) -> None:
    dataset = flat_dataset([0] * 22 + [1] * 4 + [2] * 4, domains=[0, 1] * 15)
    with pytest.raises(UserError, match=message) as caught:
        make_partition(dataset, PartitionConfig(**config), 1)
    assert "\n" not in str(caught.value)


def test_one_domain_is_refused_for_the_domain_scheme() -> None:
    with pytest.raises(UserError, match="two or more domains"):
        make_partition(flat_dataset([0, 1] * 5), PartitionConfig(scheme="domain", clients=2), 1)
