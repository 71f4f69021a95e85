"""Small CLIPs, data sets, configs and batches that tests are built from."""

from __future__ import annotations

from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.model import CLIP
from PIL import Image

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.schema import Config
from fedprompt.data.dataset import TEST, TRAIN, ImageDataset
from fedprompt.data.features.inputs import Inputs
from fedprompt.experiment.validate import validate
from fedprompt.methods.base import Batch, RoundInfo, Tensors
from fedprompt.rng import generator

CLASS_NAMES = ("river", "dense residential", "harbor", "ground track field", "beach", "runway")


RANDOM_CLIP = {
    "embed_dim": 32,
    "vision_cfg": {
        "image_size": 32,
        "patch_size": 8,
        "width": 64,
        "layers": 2,
        "head_width": 32,
    },
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 64,
        "heads": 4,
        "layers": 3,
    },
}


def random_clip(**changes: Any) -> FrozenCLIP:
    """A CLIP with random weights of a fixed seed; text and vision small."""
    cfg = {k: dict(v) if isinstance(v, dict) else v for k, v in RANDOM_CLIP.items()}
    for key, value in changes.items():
        cfg[key] = {**cfg[key], **value} if isinstance(value, dict) else value
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIP(**cfg)
    return FrozenCLIP(model, open_clip.SimpleTokenizer(), name="random", weights_hash="seed 0")


def random_resnet_clip() -> FrozenCLIP:
    """A CLIP with a small ResNet as its image tower, and 64 x 64 pixels."""
    vision = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIP(**{**RANDOM_CLIP, "vision_cfg": vision})
    return FrozenCLIP(model, open_clip.SimpleTokenizer(), name="resnet", weights_hash="seed 0")


def batch_of(
    inputs: Inputs | torch.Tensor,
    labels_KB: torch.Tensor,
    mask_KB: torch.Tensor | None = None,
    *,
    received: Tensors | None = None,
    server_round: int = 1,
    step: int = 0,
    first: int = 0,
) -> Batch:
    """A step of clients `first`, `first` + 1, ... in their visit to a round; lr 0.01, seed 1."""
    inputs = inputs if isinstance(inputs, Inputs) else Inputs(inputs)
    clients = labels_KB.shape[0]
    round_info = RoundInfo(
        clients=tuple(range(first, first + clients)),
        seed=1,
        server_round=server_round,
        rounds=10,
        lr=0.01,
        received=received or {},
        steps_K=torch.full((clients,), 5),
        class_counts_KC=torch.stack([torch.bincount(y, minlength=6) for y in labels_KB]),
    )
    mask_KB = torch.ones_like(labels_KB, dtype=torch.bool) if mask_KB is None else mask_KB
    return Batch(inputs, labels_KB, mask_KB, round_info, step)


def fake_dataset(images: int = 240, classes: int = 6, domains: int = 2) -> ImageDataset:
    """A data set without pictures: only labels, splits and domains matter."""
    draw = generator(0, "fake dataset")
    labels_N = np.arange(images, dtype=np.int64) % classes
    split_N = np.where(np.arange(images) % 24 < 18, TRAIN, TEST).astype(np.int8)
    return ImageDataset(
        name="fake",
        class_names=CLASS_NAMES[:classes],
        labels_N=labels_N,
        split_N=split_N,
        domains_N=draw.integers(0, domains, images),
        domain_names=tuple(f"domain {i}" for i in range(domains)),
        fingerprint="fake",
        open_image=lambda i: Image.new("RGB", (32, 32), (int(i) % 256, 0, 0)),
    )


def small_config(**sections: Any) -> Config:
    """A quick config of 4 clients and 3 rounds, over which sections are merged.

    A `data` section that names a source replaces the small one of drawn scenes.
    """
    raw: dict[str, Any] = {
        "experiment": "test",
        "seed": 1,
        "backbone": {"model": "tiny", "device": "cpu"},
        "data": {"images_per_class": 8},
        "partition": {"clients": 4, "alpha": 0.5},
        "method": {"name": "fedrsclip"},
        "strategy": {"name": "fedavg"},
        "training": {"lr": 0.05, "batch_size": 8},
        "federation": {"rounds": 3},
        "simulation": {"threads": 1},
        "evaluation": {"local_only": False},
        "output": {"report": False},
    }
    if "source" in sections.get("data", {}):
        del raw["data"]
    for key, value in sections.items():
        both = isinstance(value, dict) and isinstance(raw.get(key), dict)
        raw[key] = {**raw[key], **value} if both else value
    return validate(raw)
