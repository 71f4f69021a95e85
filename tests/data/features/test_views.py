"""Augmented views: seeded, cached, normalised like test images; one view changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.schema import Config
from fedprompt.data.features.cache import cached
from fedprompt.data.features.encoding import augmented, plain
from fedprompt.data.features.inputs import Inputs
from fedprompt.data.images import random_view
from fedprompt.experiment.display import QuietDisplay
from fedprompt.experiment.run import run
from fedprompt.experiment.workspaces import open_workspace
from fedprompt.methods.base import ClientData, Task
from fedprompt.methods.parts.schedule import draw_batches
from fedprompt.methods.registry import method_class
from fedprompt.rng import generator
from fedprompt.training import train_clients
from tests.support.builders import small_config
from tests.support.fake_data import FakeClip, flat_dataset, plain_features

# Red grows from left to right, green from top to bottom: a view tells where it was cut.
RAMP = np.zeros((90, 120, 3), dtype=np.uint8)
RAMP[..., 0] = np.arange(120)[None, :] * 2
RAMP[..., 1] = np.arange(90)[:, None] * 2
PICTURE = Image.fromarray(RAMP)


def cut(view: Image.Image) -> tuple[float, float, bool]:
    """Width and height of the part that a view of the ramp shows, and whether it is mirrored."""
    pixels = np.asarray(view, dtype=float)
    steps_x = np.diff(pixels[..., 0].mean(0)).mean() * (pixels.shape[1] / 2)
    steps_y = np.diff(pixels[..., 1].mean(1)).mean() * (pixels.shape[0] / 2)
    return abs(steps_x), steps_y, bool(steps_x < 0)


def test_crops_have_the_asked_size_area_and_ratio() -> None:
    shares, ratios, mirrored = [], [], []
    for i in range(200):
        view = random_view(PICTURE, (48, 48), generator(0, "view", i), 0.25)
        assert view.size == (48, 48)
        width, height, flip = cut(view)
        shares.append(width * height / (120 * 90))
        ratios.append(width / height)
        mirrored.append(flip)
    assert 0.23 < min(shares) < 0.35
    assert 0.85 < max(shares) < 1.03
    assert 0.70 < min(ratios) < 0.85
    assert 1.2 < max(ratios) < 1.4
    assert 70 < sum(mirrored) < 130


@pytest.mark.parametrize("size", [(200, 4), (4, 200), (1, 1)])
def test_a_picture_too_narrow_for_a_crop_gives_its_middle(size: tuple[int, int]) -> None:
    pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    middle = (slice(size[1] // 2 - 2, size[1] // 2 + 3), slice(size[0] // 2 - 2, size[0] // 2 + 3))
    pixels[middle if min(size) > 1 else slice(None)] = 255
    view = random_view(Image.fromarray(pixels), (16, 16), generator(0, "v"), 1.0)
    assert view.size == (16, 16)
    assert np.asarray(view).mean() > 150


def test_views_are_seeded_by_view_and_image(tmp_path: Path) -> None:
    dataset = flat_dataset([0, 1, 2, 0])
    ramps = replace(dataset, open_image=lambda i: PICTURE.rotate(180 * (i % 2)))
    clip = FakeClip()
    assert augmented(clip, ramps, 0, 0.08).view == plain(clip, ramps).view == "center"
    (one,) = cached(clip, ramps, tmp_path, [augmented(clip, ramps, 1, 0.08)])
    (two,) = cached(clip, ramps, tmp_path, [augmented(clip, ramps, 2, 0.08)])
    (again,) = cached(FakeClip(), ramps, tmp_path / "new", [augmented(clip, ramps, 1, 0.08)])
    (wide,) = cached(clip, ramps, tmp_path, [augmented(clip, ramps, 1, 0.5)])
    assert np.array_equal(one, again)
    for other in (two, wide, plain_features(clip, ramps, tmp_path)):
        assert other.shape == one.shape == (4, 4)
        assert not np.isclose(other, one).all(1).any()
    names = {p.parent.name[:-33] for p in tmp_path.rglob("*.rows")}
    assert names == {"center", "crop0.08-1", "crop0.08-2", "crop0.5-1"}


def test_crops_are_normalised_as_test_images_are(clip: FrozenCLIP) -> None:
    """A flat picture looks the same however it is cropped: so must its inputs."""
    grey = Image.new("RGB", (70, 50), (90, 120, 150))
    dataset = replace(flat_dataset([0]), open_image=lambda i: grey)
    whole = plain(clip, dataset).load(0)
    for view in (1, 2, 3):
        crop = augmented(clip, dataset, view, 0.08).load(0)
        assert crop.shape == whole.shape
        assert torch.equal(crop, whole)


def test_rows_of_some_images_only(tmp_path: Path) -> None:
    dataset, clip = flat_dataset([0, 1, 2, 0, 1]), FakeClip()
    encoding = plain(clip, dataset)
    (some,) = cached(clip, dataset, tmp_path, [encoding], index_R=np.array([3, 0]))
    assert clip.batches == [2]
    everyone = plain_features(clip, dataset, tmp_path)
    assert np.array_equal(some, everyone[np.array([3, 0])])
    (other,) = cached(clip, dataset, tmp_path, [encoding], index_R=np.array([0, 3]))
    assert np.array_equal(other, everyone[np.array([0, 3])])
    assert clip.batches == [2, 3], "each image was encoded once"


# Training


def client(number: int, n: int, views: int, dim: int = 32) -> ClientData:
    draw = generator(0, "views", number)
    features = torch.from_numpy(draw.standard_normal((views * n, dim))).float()
    labels = torch.from_numpy(draw.integers(0, 3, n))
    return ClientData(number, Inputs(F.normalize(features, dim=-1)), labels, views)


def test_every_image_once_per_epoch_in_a_drawn_view() -> None:
    config = small_config(training={"local_epochs": 3, "batch_size": 4}).training
    data = [client(5, 7, 3), client(6, 9, 3)]
    schedule = draw_batches(data, config, seed=1, server_round=2)
    seen: set[tuple[int, int]] = set()
    for k, (first, n, steps) in enumerate([(0, 7, 2), (21, 9, 3)]):
        for epoch in range(3):
            rows = schedule.index_SKB[epoch * steps : (epoch + 1) * steps, k]
            mask = schedule.mask_SKB[epoch * steps : (epoch + 1) * steps, k]
            chosen = (rows[mask] - first).numpy()
            assert chosen.min() >= 0
            assert chosen.max() < 3 * n
            assert sorted(chosen % n) == list(range(n))
            seen |= {(int(c) // n, epoch) for c in chosen}
            others = schedule.second_SKB[epoch * steps : (epoch + 1) * steps, k][mask] - first
            assert (others.numpy() % n == chosen % n).all(), "the same images"
            assert (others.numpy() // n != chosen // n).all(), "in other views"
    assert {view for view, _ in seen} == {0, 1, 2}
    assert 0 <= int(schedule.second_SKB.min()) <= int(schedule.second_SKB.max()) < 3 * (7 + 9)
    again = draw_batches(data, config, seed=1, server_round=2)
    assert torch.equal(again.index_SKB, schedule.index_SKB)
    later = draw_batches(data, config, seed=1, server_round=3)
    assert not torch.equal(later.index_SKB, schedule.index_SKB)


def test_views_that_are_all_alike_train_as_one_does(clip: FrozenCLIP) -> None:
    cls = method_class("promptfl")
    method = cls(cls.Config(context_tokens=2), clip, Task(("a", "b", "c")))
    one = [client(k, n, 1, clip.embed_dim) for k, n in ((0, 5), (1, 9))]
    many = [ClientData(d.client, Inputs.cat([d.inputs] * 4), d.labels_N, views=4) for d in one]
    config = small_config(training={"local_epochs": 2, "batch_size": 4}).training

    def train(data: list[ClientData]) -> list[Any]:
        shared = method.init_shared(1)
        return train_clients(
            method, [shared, shared], [{}, {}], data, config, seed=1, server_round=1, rounds=2
        )

    for a, b in zip(train(one), train(many), strict=True):
        assert torch.equal(a.shared["ctx"], b.shared["ctx"])
        assert (a.num_examples, a.losses) == (b.num_examples, b.losses)


def test_a_run_with_views_trains_on_them_and_tests_on_plain_images(
    run_config: Callable[..., Config], tmp_path: Path
) -> None:
    sections = {"federation": {"rounds": 1}, "protocols": ["global", "personalised"]}
    data = {"images_per_class": 4, "domains": ["savanna"]}
    lines = {}
    for views in (1, 3):
        config = run_config(**sections, data={**data, "views": views})
        config = replace(config, output=replace(config.output, dir=str(tmp_path / f"views{views}")))
        workspace = open_workspace(config)
        found = workspace.train_data(0)
        n = len(workspace.partition.train(0))
        assert (len(found), found.views, len(found.inputs.features)) == (n, views, views * n)
        expected = workspace.views[0].rows(workspace.partition.train(0)).features
        assert torch.equal(found.inputs.features[:n], expected), "view 0 is the plain one"
        if views > 1:
            assert not torch.isclose(found.inputs.features[n : 2 * n], expected).all(1).any()
        folder = run(config, QuietDisplay())
        text = (folder / "metrics.jsonl").read_text()
        lines[views] = [json.loads(line) for line in text.splitlines()]
    assert lines[1][0] == lines[3][0], "before training, only tests"
    assert lines[1][1]["train"] != lines[3][1]["train"]
