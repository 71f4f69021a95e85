"""Class lists, jobs and their counts, and workspaces of exact sizes."""

from __future__ import annotations

import pytest
import torch

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.bench.class_lists import CIFAR100, LISTS, class_names
from fedprompt.bench.job import Job, Piece, few_shot_job, total
from fedprompt.bench.workload import Sizes, make_workspace, reference_clients
from fedprompt.errors import UserError


def test_class_lists_are_whole_and_real() -> None:
    assert [len(names) for names in LISTS] == [10, 45, 100, 345]
    assert all(len(set(names)) == len(names) for names in LISTS)
    assert not any("_" in name for names in LISTS for name in names)
    assert class_names(50) == CIFAR100[:50]
    for bad in (1, 346):
        with pytest.raises(UserError, match=f"{bad} classes"):
            class_names(bad)


def test_counts_of_a_job_by_hand() -> None:
    job = Job(3, Sizes(2, train=20, test=7, server_test=10), rounds=5, batch=8, test_batch=4)
    assert job.reference_counts() == {
        Piece("reference", "copy"): 10,
        Piece("reference", "step", 8): 20,  # 5 rounds, 2 clients, batches of 8, 8 and 4 images
        Piece("reference", "step", 4): 10,
        Piece("reference", "test", 4): 6 * (2 * 1 + 2),  # evaluations before and after 5 rounds
        Piece("reference", "test", 3): 6 * 2,
        Piece("reference", "test", 2): 6 * 1,
    }
    assert total(job.our_counts(), dict.fromkeys(job.our_counts(), 1.0)) == 64 / 16 + 5 + 1
    few = few_shot_job(10, classes=100, shots=8, tests=25, rounds=50)
    assert few.sizes == Sizes(10, train=80, test=250, server_test=2500)


def test_a_workspace_has_exactly_the_images_asked_for(clip: FrozenCLIP) -> None:
    sizes = Sizes(3, train=4, test=2, server_test=5)
    images = torch.arange(sizes.images, dtype=torch.float32)[:, None, None, None]
    workspace = make_workspace(clip, class_names(6), sizes)
    assert len(workspace.server_test()[1]) == 5
    taken = [workspace.partition.server_test.tolist()]
    for client in reference_clients(workspace, images):
        data = workspace.train_data(client.client)
        assert torch.equal(data.labels_N, client.train_labels)
        assert len(client.train_labels) == 4
        assert len(client.test_labels) == 2
        taken.append(client.train_images.flatten().int().tolist())
        taken.append(client.test_images.flatten().int().tolist())
    assert sorted(n for part in taken for n in part) == list(range(sizes.images))
