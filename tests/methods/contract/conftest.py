"""Every method in turn, with pictures of six classes that any method can learn from."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.data.dataset import TEST, TRAIN, ImageDataset
from fedprompt.data.features.table import FeatureTable, open_feature_table
from fedprompt.data.partition import make_partition
from fedprompt.methods.base import Method
from fedprompt.methods.registry import all_methods
from fedprompt.methods.trip import TRIPConfig
from fedprompt.rng import generator
from fedprompt.workspace import Workspace
from tests.support import twins
from tests.support.builders import CLASS_NAMES, random_clip, small_config
from tests.support.detectors import strategy_of


@pytest.fixture(scope="module")
def clip() -> FrozenCLIP:
    """Random weights, and narrow towers of four layers, to which deeper prompts are cut."""
    vision = {"width": 32, "head_width": 16, "layers": 4, "patch_size": 16}
    text = {"width": 32, "heads": 2, "layers": 4}
    return random_clip(vision_cfg=vision, text_cfg=text)


@pytest.fixture(scope="module")
def dataset() -> ImageDataset:
    """Sixty coloured, noisy pictures of six classes."""
    images, classes = 60, len(CLASS_NAMES)
    colours = generator(0, "colours").integers(0, 255, (classes, 4, 4, 3))

    def picture(index: int) -> Image.Image:
        noise = generator(0, "picture", index).integers(-30, 30, (4, 4, 3))
        values = np.clip(colours[index % classes] + noise, 0, 255).astype(np.uint8)
        return Image.fromarray(values).resize((32, 32), Image.Resampling.NEAREST)

    return ImageDataset(
        name="pictures",
        class_names=CLASS_NAMES,
        labels_N=np.arange(images, dtype=np.int64) % classes,
        split_N=np.where(np.arange(images) < 48, TRAIN, TEST).astype(np.int8),
        domains_N=np.zeros(images, dtype=np.int64),
        domain_names=("all",),
        fingerprint="coloured pictures",
        open_image=lambda i: picture(int(i)),
    )


@pytest.fixture(scope="module")
def columns(
    clip: FrozenCLIP, dataset: ImageDataset, tmp_path_factory: pytest.TempPathFactory
) -> FeatureTable:
    """Everything that a method may need of these pictures, from the cache."""
    cache = tmp_path_factory.mktemp("cache")
    needs, routing = {"patches", "local", "pixels", "routing", "statistics"}, TRIPConfig().routing
    return open_feature_table(clip, dataset, cache, needs, routing=routing, progress=False)


# Built once for all tests of a file: to build a method, its hand-written prompts are encoded.
@pytest.fixture(scope="module", params=list(all_methods()))
def method(request: pytest.FixtureRequest, clip: FrozenCLIP) -> Method:
    return twins.build(clip, request.param)


@pytest.fixture(scope="module")
def trainable(method: Method) -> Method:
    if not method.trainable:
        pytest.skip(f"{method.name} learns nothing")
    return method


@pytest.fixture(scope="module")
def workspace(
    method: Method, clip: FrozenCLIP, dataset: ImageDataset, columns: FeatureTable
) -> Workspace:
    config = small_config(
        method={"name": method.name},
        strategy=strategy_of(method),
        partition={"clients": 3, "alpha": 10.0},
        training={"lr": 0.01, "batch_size": 8},
        federation={"rounds": 3, "fraction": 0.7},
        evaluation={"every": 3},
    )
    partition = make_partition(dataset, config.partition, config.seed)
    return Workspace(config, clip, dataset, partition, [columns])
