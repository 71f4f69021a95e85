"""Validation images: no image is in two parts, and tests do not depend on them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from fedprompt.cli.data_views import partition_table
from fedprompt.config.schema import PartitionConfig
from fedprompt.data.dataset import TEST, TRAIN, VAL, ImageDataset
from fedprompt.data.partition import Partition, describe, make_partition
from fedprompt.data.partition.file import origin_of, read_partition, write_partition
from fedprompt.errors import UserError
from fedprompt.tuning.plan import validation_overrides
from tests.data.partition.test_partition import settings_of
from tests.support.builders import small_config
from tests.support.fake_data import flat_dataset

Case = tuple[ImageDataset, PartitionConfig, int]


def parts(partition: Partition) -> list[np.ndarray]:
    return [
        *(p(k) for k in range(partition.num_clients)
          for p in (partition.train, partition.validation, partition.test)),
        partition.server_validation,
        partition.server_test,
    ]  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True)
@given(settings_of(), st.sampled_from([0.0, 0.09]), st.sampled_from([None, 2]))
def test_official_validation_images_are_the_servers(
    case: Case, local: float, shots: int | None
) -> None:
    """For every scheme: in no other part, and nobody else's images depend on them."""
    dataset, config, seed = case
    config = replace(config, shots=shots, local_validation_fraction=local)
    official_N = (dataset.split_N == TEST) & (np.arange(len(dataset)) % 2 == 0)
    split = replace(dataset, split_N=np.where(official_N, VAL, dataset.split_N).astype(np.int8))
    plain, partition = make_partition(dataset, config, seed), make_partition(split, config, seed)
    held = np.concatenate(parts(partition))
    assert len(np.unique(held)) == len(held)
    assert np.array_equal(partition.server_validation, np.flatnonzero(official_N))
    assert (split.split_N[partition.server_test] == TEST).all()
    for name in ("train_flat", "test_flat", "validation_flat"):
        assert np.array_equal(getattr(partition, name), getattr(plain, name))
    assert describe(split, partition).get("official_validation_images", 0) == official_N.sum()


def test_the_view_says_where_validation_images_come_from(tmp_path: Path) -> None:
    dataset = flat_dataset([0, 1] * 30, test=range(40, 60))
    dataset = replace(dataset, image_names=tuple(f"{i}.png" for i in range(60)))
    config = PartitionConfig(clients=2, scheme="iid", server_validation_fraction=0.5)
    console = Console(width=200)
    texts = []
    for one, settings_ in (
        (dataset, config),
        (official(dataset), replace(config, server_validation_fraction=0.0)),
    ):
        made = make_partition(one, settings_, 1)
        # Through a file, the images remain those of the official split.
        write_partition(tmp_path / "p.json", one, made, origin_of(settings_, 1))
        read = read_partition(tmp_path / "p.json", one, 2)
        assert np.array_equal(read.server_validation, made.server_validation)
        with console.capture() as shown:
            console.print(partition_table("data", describe(one, read), 200))
        texts.append(shown.get())
    assert "10 on the server (taken from the test images)" in texts[0]
    assert "10 on the server (of the official split)" in texts[1]


def official(dataset: ImageDataset) -> ImageDataset:
    """Every second test image is one of an official validation split."""
    chosen = np.flatnonzero(dataset.split_N == TEST)[::2]
    split_N = dataset.split_N.copy()
    split_N[chosen] = VAL
    return replace(dataset, split_N=split_N)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"data": {"dataset": "dtd", "root": "x", "validation": "server"},
             "partition": {"server_validation_fraction": 0.2}},
            "server_validation_fraction",
        ),
        ({"data": {"dataset": "dtd", "hub_id": "a/b", "validation": "server"}}, "validation_split"),
        ({"data": {"source": "hub", "hub_id": "a/b", "validation_split": "v"}}, "test_split"),
    ],
)  # fmt: skip
def test_what_cannot_be_an_official_split_is_one_line(keys: dict[str, Any], said: str) -> None:
    keys["data"] = {"source": "catalogue", **keys["data"]}
    with pytest.raises(UserError, match=said) as caught:
        small_config(**keys)
    assert "\n" not in str(caught.value)


def test_a_round_can_be_chosen_and_a_search_made_on_an_official_split() -> None:
    data = {"source": "catalogue", "dataset": "dtd", "root": "x", "validation": "server"}
    config = small_config(data=data, evaluation={"select": "best_validation"})
    assert validation_overrides(config) == ("partition.local_validation_fraction=0.2",)
    assert len(validation_overrides(small_config())) == 2


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    settings_of(),
    st.sampled_from([0.0, 0.05, 0.09]),
    st.sampled_from([0.0, 0.3, 0.9]),
    st.sampled_from([None, 1, 2, 6]),
)
def test_no_image_is_in_two_parts_and_tests_stay(
    case: Case, local: float, server: float, shots: int | None
) -> None:
    dataset, config, seed = case
    without = replace(config, shots=shots)
    config = replace(without, local_validation_fraction=local, server_validation_fraction=server)
    plain, partition = (make_partition(dataset, c, seed) for c in (without, config))
    held = np.concatenate(parts(partition))
    assert len(np.unique(held)) == len(held)
    # The clients' test images are the same with and without validation images.
    assert (partition.test_flat == plain.test_flat).all()
    assert (partition.test_offsets == plain.test_offsets).all()
    together = np.concatenate((partition.server_test, partition.server_validation))
    assert np.array_equal(np.sort(together), plain.server_test)
    assert (dataset.split_N[partition.validation_flat] == TRAIN).all()
    assert (dataset.split_N[partition.server_validation] == TEST).all()
    classes = len(dataset.class_names)
    train_KC = partition.train_counts(dataset.labels_N, classes)
    assert ((train_KC > 0) == (plain.train_counts(dataset.labels_N, classes) > 0)).all()
    if not local:
        assert (partition.train_flat == plain.train_flat).all()
        assert not len(partition.validation_flat)
    if not server:
        assert not len(partition.server_validation)
    if local and shots:
        validation_KC = partition.validation_counts(dataset.labels_N, classes)
        assert validation_KC.max() <= min(shots, 4)
        assert train_KC.max() <= shots


def test_the_server_divides_every_class_and_domain() -> None:
    labels = np.repeat(np.arange(3), 40)
    dataset = flat_dataset(labels.tolist(), domains=(np.arange(120) % 2).tolist(), test=range(120))
    dataset = replace(dataset, split_N=np.where(np.arange(120) % 40 < 20, TRAIN, TEST).astype("i1"))
    config = PartitionConfig(scheme="iid", clients=2, server_validation_fraction=0.3)
    chosen = make_partition(dataset, config, 1).server_validation
    cells = np.bincount(dataset.labels_N[chosen] * 2 + dataset.domains_N[chosen], minlength=6)
    assert cells.tolist() == [3] * 6


@pytest.mark.parametrize(
    ("images", "train", "validation"), [(8, 4, 4), (6, 3, 3), (2, 1, 1), (1, 1, 0), (30, 4, 4)]
)
def test_few_shots_follow_coop(images: int, train: int, validation: int) -> None:
    dataset = flat_dataset([0] * images + [1] * 40, test=[])
    config = PartitionConfig(
        scheme="iid", clients=1, shots=4, local_test_fraction=0.0, local_validation_fraction=0.1
    )
    partition = make_partition(dataset, config, 1)
    assert partition.train_counts(dataset.labels_N, 2)[0, 0] == train
    assert partition.validation_counts(dataset.labels_N, 2)[0, 0] == validation


def test_owned_images_are_split_alike_on_every_node() -> None:
    dataset = flat_dataset([0, 1] * 20, test=[])
    owners = np.repeat([0, 1], 20)
    config = PartitionConfig(clients=2, local_validation_fraction=0.2)
    whole = make_partition(replace(dataset, owners_N=owners), config, 1)
    on_node = make_partition(replace(dataset, owners_N=np.where(owners == 1, 1, -1)), config, 1)
    assert len(whole.validation(1)) == 4
    assert np.array_equal(whole.validation(1), on_node.validation(1))
    assert np.array_equal(whole.train(1), on_node.train(1))


def test_a_partition_file_keeps_them(tmp_path: Path) -> None:
    dataset = flat_dataset([0, 1, 2] * 20, test=range(0, 60, 4))
    names = tuple(f"{i}.png" for i in range(len(dataset)))
    dataset = replace(dataset, image_names=names)
    config = PartitionConfig(
        scheme="iid", clients=3, local_validation_fraction=0.2, server_validation_fraction=0.5
    )
    partition = make_partition(dataset, config, 1)
    write_partition(tmp_path / "p.json", dataset, partition, origin_of(config, 1))
    again = read_partition(tmp_path / "p.json", dataset, 3)
    assert partition.has_validation
    for one, other in zip(parts(partition), parts(again), strict=True):
        assert np.array_equal(one, other)


def test_fractions_that_leave_nothing_to_train_on_are_refused() -> None:
    with pytest.raises(UserError, match="local_validation_fraction"):
        small_config(partition={"local_test_fraction": 0.5, "local_validation_fraction": 0.5})
