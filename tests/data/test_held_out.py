"""Views of a data set without some classes or a domain: nothing held out is left in them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedprompt.config.schema import PartitionConfig
from fedprompt.data.dataset import HELD, TEST, TRAIN
from fedprompt.data.held_out import hold_out_classes, hold_out_domain
from fedprompt.data.partition import make_partition
from tests.support.builders import fake_dataset

DATASET = replace(fake_dataset(), superclass_names=("a", "b", "c", "a", "b", "c"))


@pytest.mark.parametrize("held", [(3, 4, 5), (0, 2), (5,)])
def test_classes_are_renumbered_and_nobody_holds_the_others(held: tuple[int, ...]) -> None:
    view, out = hold_out_classes(DATASET, held)
    kept = [c for c in range(6) if c not in held]
    assert view.class_names == tuple(DATASET.class_names[c] for c in kept)
    assert view.superclass_names == tuple("abcabc"[c] for c in kept)
    assert out.class_names == tuple(DATASET.class_names[c] for c in held)
    is_held = np.isin(DATASET.labels_N, held)
    assert (view.split_N[is_held] == HELD).all()
    assert (view.split_N[~is_held] == DATASET.split_N[~is_held]).all()
    for i in np.flatnonzero(~is_held):
        assert view.class_names[view.labels_N[i]] == DATASET.class_names[DATASET.labels_N[i]]
    assert out.index_N.tolist() == np.flatnonzero(is_held & (DATASET.split_N == TEST)).tolist()
    names = [out.class_names[label] for label in out.labels_N]
    assert names == [DATASET.class_names[DATASET.labels_N[i]] for i in out.index_N]
    assert (view.fingerprint, len(view)) == (DATASET.fingerprint, len(DATASET))
    partition = make_partition(view, PartitionConfig(clients=4, alpha=0.5), 1)
    dealt = np.concatenate([partition.train_flat, partition.test_flat, partition.server_test])
    assert sorted(dealt) == np.flatnonzero(~is_held).tolist()


@pytest.mark.parametrize("tests_only", [True, False])
def test_a_domain_is_gone_and_the_others_keep_their_names(tests_only: bool) -> None:
    dataset = fake_dataset(domains=3)
    view, out = hold_out_domain(dataset, 1, tests_only=tests_only)
    is_held = dataset.domains_N == 1
    assert view.domain_names == ("domain 0", "domain 2")
    assert out.name == "domain 1"
    for i in np.flatnonzero(~is_held):
        assert view.domain_names[view.domains_N[i]] == dataset.domain_names[dataset.domains_N[i]]
    assert (view.split_N[is_held] == HELD).all()
    wanted = is_held & (dataset.split_N == TEST) if tests_only else is_held
    assert out.index_N.tolist() == np.flatnonzero(wanted).tolist()
    assert (out.labels_N == dataset.labels_N[out.index_N]).all()
    partition = make_partition(view, PartitionConfig(scheme="domain", clients=4), 1)
    dealt = np.concatenate([partition.train_flat, partition.test_flat, partition.server_test])
    assert not np.isin(dealt, np.flatnonzero(is_held)).any()
    assert (dataset.split_N != HELD).all(), "the data set itself is unchanged"
    assert (dataset.split_N == TRAIN).any()
