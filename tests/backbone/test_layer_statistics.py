"""Statistics of the image tower's tokens: values, one pass for both columns, and refusals."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.layer_statistics import StatisticsEncoder
from fedprompt.data.features.table import encode_inputs, open_feature_table
from fedprompt.errors import UserError
from tests.support.builders import random_resnet_clip
from tests.support.fake_data import flat_dataset


def noise(index: int) -> Image.Image:
    draw = np.random.default_rng(index)
    return Image.fromarray(draw.integers(0, 256, (40, 40, 3), dtype=np.uint8))


@contextmanager
def encoded_images(clip: FrozenCLIP) -> Iterator[list[int]]:
    """The numbers of images that pass through the image tower."""
    counts: list[int] = []
    visual: Any = clip.model.visual
    hook = visual.register_forward_hook(lambda _m, x, _out: counts.append(len(x[0])))
    try:
        yield counts
    finally:
        hook.remove()


@pytest.mark.parametrize("count", [3, 9])
def test_values_are_those_of_the_blocks(clip: FrozenCLIP, count: int) -> None:
    images = torch.randn(count, 3, *clip.model.visual.image_size)
    both = StatisticsEncoder(clip)
    visual: Any = clip.model.visual
    with torch.no_grad():
        x = visual._embeds(images)
        for layer, block in enumerate(visual.transformer.resblocks):
            x = block(x)
            ours = both.statistics(images)[:, layer]
            torch.testing.assert_close(ours[:, 0], x.mean(1), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(ours[:, 1], x.std(1, correction=0), rtol=1e-4, atol=1e-5)
    assert both.statistics(images).shape == (count, *both.shape)
    assert torch.equal(both.features(images), clip.encode_images(images))
    other = images.flip(-1)
    assert not torch.equal(both.statistics(other), both.statistics(images))


def test_both_columns_come_from_one_pass_and_only_who_asks_pays(
    clip: FrozenCLIP, tmp_path: Path
) -> None:
    dataset = replace(flat_dataset([0, 1, 2, 0, 1]), open_image=noise)

    def opened(folder: str, *needs: str, view: int = 0) -> tuple[Any, int]:
        with encoded_images(clip) as counts:
            table = open_feature_table(
                clip, dataset, tmp_path / folder, needs, view=view, crop_scale=0.5, progress=False
            )
        return table, sum(counts)

    # A batch of five is filled up to eight.
    plain, passed = opened("plain")
    assert (plain.statistics_NL2w, passed) == (None, 8)
    both, passed = opened("both", "statistics")
    assert passed == 8
    np.testing.assert_array_equal(np.asarray(both.features_ND[:]), np.asarray(plain.features_ND[:]))
    assert opened("both", "statistics")[1] == opened("both")[1] == 0
    # Features that are there already keep their bits; statistics are added, and views are apart.
    later, passed = opened("plain", "statistics")
    assert passed == 8
    rows = np.arange(5)
    statistics = later.rows(rows).statistics
    assert statistics is not None
    assert torch.equal(statistics, both.rows(rows).statistics)
    crop = opened("both", "statistics", view=1)[0].rows(rows).statistics
    assert not torch.equal(crop, statistics)
    assert later.rows(rows, {"features"}).statistics is None
    images = torch.stack([clip.preprocess(dataset.open_image(i)) for i in range(5)])
    fresh = encode_inputs(clip, images, {"statistics"}).statistics
    torch.testing.assert_close(fresh, statistics)


def test_a_resnet_has_no_layers_of_tokens(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"backbone.*ViT"):
        open_feature_table(
            random_resnet_clip(), flat_dataset([0]), tmp_path, {"statistics"}, progress=False
        )
