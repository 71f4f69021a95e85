"""Tiny data of the real formats: image folders, hub-style data sets, and a CLIP stand-in.

Every image is one flat colour, `colour(label, number)`, so a test can tell which image it got.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fedprompt.data.dataset import TEST, TRAIN, ImageDataset
from fedprompt.data.features.cache import cached
from fedprompt.data.features.encoding import plain


def colour(label: int, number: int) -> tuple[int, int, int]:
    """The flat colour of one image: red tells its class, green its number."""
    return (20 + 30 * label, 5 * number, 128)


def encoded(rgb: tuple[int, int, int], size: int = 8, suffix: str = "png") -> bytes:
    """A flat image, encoded."""
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), rgb).save(buffer, {"jpg": "JPEG"}.get(suffix, suffix))
    return buffer.getvalue()


def truncated() -> bytes:
    """A JPEG cut in half: its header is fine, and only decoding all of it shows the damage."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG")
    half = buffer.getvalue()[: buffer.tell() // 2]
    Image.open(io.BytesIO(half)).verify()
    return half


def write_image_folder(
    root: Path, counts: Mapping[str, int], *, suffix: str = "png", first: int = 0
) -> Path:
    """`root/<class>/<number>.<suffix>`, `counts[class]` images each; labels in dict order."""
    for label, (name, count) in enumerate(counts.items()):
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(first, first + count):
            file = folder / f"{number:03d}.{suffix}"
            file.write_bytes(encoded(colour(label, number), suffix=suffix))
    return root


def hub_dataset(
    labels: Sequence[Any], *, names: Sequence[str] | None = None, **columns: Sequence[Any]
) -> Any:
    """A `datasets.Dataset` with columns image (encoded), label and whatever else is given."""
    import datasets

    values = sorted(set(labels))
    rows = [
        {"bytes": encoded(colour(values.index(label), i)), "path": None}
        for i, label in enumerate(labels)
    ]
    label_type = datasets.ClassLabel(names=list(names)) if names else None
    data = datasets.Dataset.from_dict({"image": rows, "label": list(labels), **columns})
    data = data.cast_column("image", datasets.Image())
    return data.cast_column("label", label_type) if label_type else data


def flat_dataset(
    labels: Sequence[int],
    *,
    domains: Sequence[int] | None = None,
    test: Sequence[int] = (),
    name: str = "flat",
) -> ImageDataset:
    """An in-memory data set of flat images; the indices in `test` form the test split."""
    labels_N = np.array(labels, dtype=np.int64)
    domains_N = np.array(domains if domains is not None else [0] * len(labels), dtype=np.int64)
    split_N = np.full(len(labels), TRAIN, dtype=np.int8)
    split_N[list(test)] = TEST
    return ImageDataset(
        name=name,
        class_names=tuple(f"class {c}" for c in range(int(labels_N.max()) + 1)),
        labels_N=labels_N,
        split_N=split_N,
        domains_N=domains_N,
        domain_names=tuple(f"domain {d}" for d in range(int(domains_N.max()) + 1)),
        fingerprint=f"{name}-{labels_N.tolist()}",
        open_image=lambda i: Image.new("RGB", (8, 8), colour(int(labels_N[i]), i % 50)),
    )


class FakeClip:
    """The cache's view of a CLIP: features are a fixed projection of the mean colour."""

    def __init__(self, embed_dim: int = 4, image_batch: int = 3, fingerprint: str = "fake") -> None:
        self.fingerprint = fingerprint
        self.preprocess_fingerprint = "mean colour"
        self.device = torch.device("cpu")
        self.embed_dim = embed_dim
        self.image_batch = image_batch
        self.batches: list[int] = []
        steps = torch.arange(3 * embed_dim, dtype=torch.float32)
        self.projection = torch.cos(steps).reshape(3, embed_dim)

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """The image as a (3, H, W) tensor in 0..1."""
        assert image.mode == "RGB"
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255

    def encode_images(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Mean colour times a fixed matrix; remembers the batch sizes it saw."""
        self.batches.append(len(images_BCHW))
        # Written out, so that a feature's last bits do not depend on the batch size.
        mean_B3 = images_BCHW.mean(dim=(2, 3))
        return sum(mean_B3[:, c, None] * self.projection[c] for c in range(3))


def plain_features(
    clip: FakeClip, dataset: ImageDataset, cache_dir: Path, *, progress: bool = True
) -> NDArray[np.float32]:
    """The plain view's features (N, D) of all images, through the cache."""
    (rows,) = cached(clip, dataset, cache_dir, [plain(clip, dataset)], progress=progress)
    return rows
