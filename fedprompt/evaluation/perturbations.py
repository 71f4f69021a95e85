"""PGD: images that are changed within a small distance to be misclassified by one model.

Source: Towards Deep Learning Models Resistant to Adversarial Attacks (Madry et al., ICLR 2018,
arXiv 1706.06083), in the maximum norm: a random start within eps, then steps of 2.5 eps / steps in
the direction of the sign of the loss's gradient, each clipped to eps and to the range of pixels.

Shape suffixes: B images, H and W pixels, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.data.dataset import ImageDataset
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import Method, Tensors
from fedprompt.rng import uniform

ATTACKABLE = frozenset({"features", "pixels"})
"""What a method may read of an image, so that its logits are a function of pixels here."""


def open_pixels(clip: FrozenCLIP, dataset: ImageDataset, index: Sequence[int]) -> Tensor:
    """Images as the backbone sees them, (B, 3, H, W), with pixels from 0 to 1."""
    images = torch.stack([clip.preprocess(dataset.open_image(i)) for i in index])
    mean, std = clip.mean_std[:, :, None, None]
    pixels: Tensor = (images * std + mean).clamp(0, 1)
    return pixels


def normalised(clip: FrozenCLIP, pixels_B3HW: Tensor) -> Tensor:
    """Images with pixels from 0 to 1 as the image tower takes them, (B, 3, H, W)."""
    mean, std = clip.mean_std[:, :, None, None].to(pixels_B3HW)
    images: Tensor = (pixels_B3HW - mean) / std
    return images


def features_of_pixels(clip: FrozenCLIP, pixels_B3HW: Tensor) -> Tensor:
    """Image features (B, D), as `encode_images` returns them, of images with pixels from 0 to 1."""
    parts = normalised(clip, pixels_B3HW).split(clip.image_batch)
    return torch.cat([clip.encode_images(part) for part in parts])


def starts(pixels_B3HW: Tensor, index: Sequence[int], seed: int) -> Tensor:
    """Random directions (B, 3, H, W) from -1 to 1, keyed by the image's number in the data set."""
    shape = tuple(pixels_B3HW.shape[1:])
    return torch.stack([2 * uniform(shape, seed, "pgd", int(i)) - 1 for i in index])


def logits_of_pixels(method: Method, encoded: Tensors, pixels_B3HW: Tensor) -> Tensor:
    """Logits (B, C) of one encoded model, with a gradient to the pixels.

    Args:
        method: a method that reads nothing but what is in `ATTACKABLE`.
        encoded: the model, with client axis 1.
        pixels_B3HW: images with pixels from 0 to 1.
    """
    inputs = inputs_of_pixels(method, normalised(method.clip, pixels_B3HW))
    return method.logits(encoded, inputs.of_one())[0].float()


def inputs_of_pixels(method: Method, normalised_B3HW: Tensor) -> Inputs:
    """What a method reads of images (B, ...), with a gradient to their pixels.

    Args:
        method: a method that reads nothing but what is in `ATTACKABLE`.
        normalised_B3HW: images as the image tower takes them.
    """
    with method.clip.autocast():
        features = method.clip.model.encode_image(normalised_B3HW).float()
    return Inputs(
        F.normalize(features, dim=-1),
        pixels=normalised_B3HW if "pixels" in method.needs else None,
        norms=features.norm(dim=-1),
    )


def perturbed(
    method: Method,
    encoded: Tensors,
    pixels_B3HW: Tensor,
    labels_B: Tensor,
    start_B3HW: Tensor,
    eps: float,
    steps: int,
) -> Tensor:
    """Images within `eps` of others that raise the model's loss.

    Args:
        method: the attacked method.
        encoded: its model, with client axis 1.
        pixels_B3HW: the images, with pixels from 0 to 1.
        labels_B: their classes.
        start_B3HW: the result of `starts`.
        eps: largest change of a pixel.
        steps: number of steps.

    Returns:
        The changed images (B, 3, H, W), on the device of the backbone.
    """
    device = method.clip.device
    clean, labels_B = pixels_B3HW.to(device), labels_B.to(device)
    found = (clean + eps * start_B3HW.to(device)).clamp(0, 1)
    for _ in range(steps):
        found.requires_grad_()
        with torch.enable_grad():
            loss = F.cross_entropy(
                logits_of_pixels(method, encoded, found), labels_B, reduction="sum"
            )
            (gradient,) = torch.autograd.grad(loss, found)
        moved = found.detach() + 2.5 * eps / steps * gradient.sign()
        found = torch.clamp(moved, clean - eps, clean + eps).clamp(0, 1)
    return found


@torch.no_grad()
def correct_under_attack(
    method: Method,
    encoded: Tensors,
    pixels_B3HW: Tensor,
    labels_B: Tensor,
    start_B3HW: Tensor,
    eps: Sequence[float],
    steps: int,
) -> list[int]:
    """How many images one model classifies correctly, unchanged and under each eps.

    Args:
        method: the method.
        encoded: its model, with client axis 1.
        pixels_B3HW: the images, with pixels from 0 to 1.
        labels_B: their classes.
        start_B3HW: the result of `starts`.
        eps: largest changes of a pixel.
        steps: number of steps of the attack.

    Returns:
        1 + len(eps) counts. An image counts under an attack if it is also correct unchanged: an
        attack that happens to correct an error has not failed.
    """
    counts = [0] * (1 + len(eps))
    at_once = method.clip.image_batch
    for first in range(0, len(labels_B), at_once):
        part = slice(first, first + at_once)
        images, labels, start = pixels_B3HW[part], labels_B[part], start_B3HW[part]
        clean = logits_of_pixels(method, encoded, images.to(method.clip.device)).argmax(-1).cpu()
        correct_B = clean == labels
        counts[0] += int(correct_B.sum())
        for number, size in enumerate(eps, 1):
            changed = perturbed(method, encoded, images, labels, start, size, steps)
            found = logits_of_pixels(method, encoded, changed).argmax(-1).cpu()
            counts[number] += int((correct_B & (found == labels)).sum())
    return counts
