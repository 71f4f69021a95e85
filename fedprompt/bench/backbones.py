"""CLIP architectures with seeded random weights.

Nothing is downloaded: speed and memory do not depend on what the weights were trained for.
"""

from __future__ import annotations

from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor

from fedprompt.backbone.architecture import adopt_weights
from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.compression import AS_TRAINED, Compression, compress
from fedprompt.backbone.tiny import tiny_model_config
from fedprompt.errors import UserError, did_you_mean
from fedprompt.rng import generator

NAMES = ("tiny", "ViT-B-32", "ViT-B-16", "ViT-L-14")
IMAGE_BATCH = 64


def random_clip(
    name: str,
    seed: int = 0,
    device: str = "cpu",
    precision: str = "float32",
    compression: Compression = AS_TRAINED,
) -> FrozenCLIP:
    """The architecture `name` with random weights.

    Args:
        name: one of `NAMES`; `tiny` is the architecture of the embedded weights.
        seed: seed of the weights.
        device: the device that they are moved to.
        precision: as `backbone.precision`.
        compression: as `backbone.weights` and `backbone.pruned`.

    Raises:
        UserError: `name` is not one of `NAMES`.
    """
    if name not in NAMES:
        raise UserError(f"--backbone {name}: not known.{did_you_mean(name, NAMES)}")
    # open_clip draws its weights from the global generator, which is restored afterwards.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = tiny_model_config() if name == "tiny" else open_clip.get_model_config(name)
        assert config is not None
        model = open_clip.model.CLIP(**config)
    if compression:
        adopt_weights(model, compress(model, model.state_dict(), compression))
    tokenizer = open_clip.SimpleTokenizer()
    return FrozenCLIP(
        model,
        tokenizer,
        name=name,
        weights_hash=f"seed {seed}",
        device=device,
        precision=precision,
        image_batch=IMAGE_BATCH,
        compression=compression,
    )


def save_weights(clip: FrozenCLIP, path: Path) -> None:
    """Write a checkpoint that `load_clip` can map into memory without a conversion."""
    # safetensors refuses tensors that share memory.
    state = {k: v.contiguous().clone() for k, v in clip.model.state_dict().items()}
    save_file(state, path)


def random_images(clip: FrozenCLIP, count: int, seed: int) -> Tensor:
    """Random numbers in place of preprocessed images.

    Args:
        clip: the backbone; it determines H and W.
        count: number of images.
        seed: seed of the numbers.

    Returns:
        (count, 3, H, W), N(0, 1), float32 on the CPU.
    """
    size = clip.model.visual.image_size
    height, width = size if isinstance(size, tuple) else (size, size)
    draw = generator(seed, "images").standard_normal((count, 3, height, width), dtype="float32")
    return torch.from_numpy(draw)


def encode_all(clip: FrozenCLIP, images_N3HW: Tensor) -> Tensor:
    """Image features (N, D), computed in batches of `image_batch` as for the feature cache."""
    parts = images_N3HW.split(clip.image_batch)
    return torch.cat([clip.encode_images(part) for part in parts])
