"""FedCoPL against a plain twin: visual prompts for everyone, a text context for each client."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import shape_only_clip
from fedprompt.data.features.table import FeatureTable
from fedprompt.experiment.workspaces import open_workspace
from fedprompt.federation.server_app import Federation
from fedprompt.messages import to_arrays
from fedprompt.methods.base import Task, uploaded_numbers
from fedprompt.methods.registry import method_class
from fedprompt.rng import generator
from fedprompt.simulation.inline_grid import InlineGrid
from fedprompt.workspace import Workspace
from tests.support import twins
from tests.support.builders import CLASS_NAMES, batch_of, random_clip, small_config

K, B = 2, 5
LABELS = torch.tensor([[0, 1, 2, 3, 3], [5, 4, 0, 0, 1]])


@pytest.fixture(scope="module")
def deep_clip() -> FrozenCLIP:
    return random_clip(vision_cfg={"layers": 4}, text_cfg={"layers": 2})


@pytest.mark.parametrize("depth", [1, 3, 4])
def test_logits_loss_and_gradients_are_the_plain_ones(deep_clip: FrozenCLIP, depth: int) -> None:
    method = twins.build(deep_clip, "fedcopl", context_tokens=4, visual_depth=depth)
    shared, private = twins.tensors(method, clients=K)
    leaves = [shared["visual"].requires_grad_(), private["ctx"].requires_grad_()]
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    batch = batch_of(twins.pictures(deep_clip, K, B), LABELS, mask)
    encoded = method.encode(shared, private)
    logits = method.logits(encoded, batch.inputs)
    terms = method.loss_terms(shared, private, encoded, batch)
    assert list(terms) == ["ce"]
    ours = torch.autograd.grad(terms["ce"].sum(), leaves)
    for k in range(K):
        visual, context = (leaf.detach()[k].clone().requires_grad_() for leaf in leaves)
        assert batch.inputs.pixels is not None
        images = twins.plain_images(deep_clip, batch.inputs.pixels[k], list(visual))
        classes = twins.plain_text(deep_clip, "X X X X", [context])
        expected = deep_clip.model.logit_scale.exp() * images @ classes.T
        twins.close(logits[k], expected)
        real = int(mask[k].sum())
        loss = F.cross_entropy(expected[:real], LABELS[k, :real])
        assert terms["ce"][k].item() == pytest.approx(loss.item(), rel=1e-4)
        for mine, theirs in zip(ours, torch.autograd.grad(loss, [visual, context]), strict=True):
            twins.close(mine[k], theirs)


def test_visual_prompts_of_eleven_layers_are_uploaded() -> None:
    """The public code's sizes on ViT-B/16: 11 layers of 5 tokens, and 16 for the text."""
    cls = method_class("fedcopl")
    method = cls(cls.Config(), shape_only_clip("ViT-B-16"), Task(CLASS_NAMES))
    assert uploaded_numbers(method) == 11 * 5 * 768 == 42_240
    assert method.init_private(1, 0)["ctx"].shape == (16, 512)
    same = (method.init_private(1, client)["ctx"] for client in (0, 7))
    assert torch.equal(*same)


@pytest.mark.parametrize("hidden", [2, 4])
def test_clients_without_labels_train_as_many_images_as_they_have_chosen(
    make_workspace: Any, clip: FrozenCLIP, hidden: int
) -> None:
    plain = make_workspace(
        method={"name": "fedcopl", "context_tokens": 2, "visual_tokens": 1},
        partition={"unlabelled_clients": hidden},
        federation={"rounds": 2},
    )
    images = len(plain.dataset)
    pixels_N3HW = generator(0, "pixels").integers(0, 255, (images, 3, 32, 32), dtype=np.uint8)
    features_ND = plain.views[0].rows(np.arange(images)).features.numpy()
    mean_std = torch.tensor([[0.5] * 3, [0.25] * 3])
    table = FeatureTable(features_ND, pixels_N3HW=pixels_N3HW, mean_std=mean_std)
    workspace = Workspace(plain.config, clip, plain.dataset, plain.partition, [table])
    grid = InlineGrid(workspace)
    federation = Federation(workspace, grid)
    federation.join()
    seen: list[int] = []
    aggregate = federation.strategy.aggregate

    def noting(server_round: int, shared: Any, updates: Any) -> Any:
        seen.extend(u.num_examples for u in updates)
        return aggregate(server_round, shared, updates)

    federation.strategy.aggregate = noting  # type: ignore[method-assign]
    line = federation.train_round(1)
    assert line["clients"]["accepted"] == 4
    unlabelled = workspace.partition.unlabelled
    expected = [
        federation.pseudo.images_of(c) if c in unlabelled else len(workspace.partition.train(c))
        for c in range(4)
    ]
    assert seen == expected
    assert sum(seen[c] for c in unlabelled) == line["pseudo_labels"]["chosen"]
    assert seen != [len(workspace.partition.train(c)) for c in range(4)]
    moved = {c: (grid.private.get(c) or {})["ctx"] for c in range(4)}
    assert not torch.equal(moved[0], moved[1])
    assert set(to_arrays(federation.arrays)) == {"visual"}


def test_it_learns_without_any_label() -> None:
    """On the embedded scenes, personal models answer better after two rounds than before."""
    config = small_config(
        method={"name": "fedcopl", "context_tokens": 4, "visual_depth": 2},
        data={"images_per_class": 8, "domains": ["delta"], "test_fraction": 0.2},
        partition={"clients": 2, "alpha": 10.0, "unlabelled_clients": 2},
        training={"lr": 0.01, "batch_size": 20, "optimizer": "adam", "weight_decay": 0.0},
        federation={"rounds": 2},
        protocols=["personalised"],
    )
    workspace = open_workspace(config)
    federation = Federation(workspace, InlineGrid(workspace))
    federation.join()
    first = federation.evaluate(0)["personal"]["mean"]
    for server_round in (1, 2):
        federation.train_round(server_round)
    assert federation.evaluate(2)["personal"]["mean"] > first + 0.1
