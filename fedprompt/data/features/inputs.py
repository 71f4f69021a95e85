"""Images as methods see them: CLIP's frozen features, and patches or pixels if a method needs them.

A training step and an evaluation pass `Inputs` to the method, on clients and on the server.

Shape suffixes: N images of a set, K clients, B images of a batch, D joint embedding, P patches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

COMMON = "mean_std"
"""The one attribute of `Inputs` that has no axis of images."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """Several images. The leading axes are (N,) for a set and (K, B) for a batch of K clients.

    Attributes:
        features: (..., D), L2-normalised features of the frozen image tower.
        patches: (..., P, D), L2-normalised features of the image's patches, or None.
        pixels: (..., 3, H, W), or None. Either floats as the image tower takes them, or bytes that
            are not normalised yet. The cache stores bytes; `on` turns them into floats.
        mean_std: (2, 3), mean and standard deviation that normalise pixels; required with bytes.
        norms: (...,), lengths of the features before they were L2-normalised; None where unknown.
        local: (..., P, D), L2-normalised local features, each of one patch alone, or None. How they
            differ from `patches` is in `fedprompt.backbone.patch_features`.
        teacher: (..., T), L2-normalised image features of another frozen model, or None.
        routing: (..., 2, E), weights of experts in training and in tests, or None; see
            `fedprompt.backbone.token_routing`.
        statistics: (..., L, 2, w), mean and standard deviation of the image tower's tokens behind
            each of its L layers of width w, or None; see `fedprompt.backbone.layer_statistics`.
    """

    features: Tensor
    patches: Tensor | None = None
    pixels: Tensor | None = None
    mean_std: Tensor | None = None
    norms: Tensor | None = None
    local: Tensor | None = None
    teacher: Tensor | None = None
    routing: Tensor | None = None
    statistics: Tensor | None = None

    def __len__(self) -> int:
        """Return the length of the first axis."""
        return self.features.shape[0]

    def __getitem__(self, index: Any) -> Inputs:
        """Index every part along the leading axes."""
        return self._each(lambda part: part[index])

    def columns(self) -> dict[str, Tensor]:
        """Every part that is there, by its name; the inverse is `Inputs(**columns)`."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: part for name, part in parts.items() if part is not None}

    def without_pixels(self) -> Inputs:
        """Return the same images without their pixels."""
        return replace(self, pixels=None)

    def with_pixels(self, pixels: Tensor) -> Inputs:
        """Return the same images with pixels, which have the same leading axes."""
        return replace(self, pixels=pixels)

    def of_one(self) -> Inputs:
        """Return a set (N, ...) as the batch (1, N, ...) of one client."""
        return self._each(lambda part: part[None])

    def swapped(self) -> Inputs:
        """Return the same images with their two leading axes exchanged."""
        return self._each(lambda part: part.transpose(0, 1))

    def on(self, device: torch.device) -> Inputs:
        """Move every part to `device` and turn pixels into normalised floats."""
        # Bytes are moved before they become floats: a quarter of the data to copy.
        moved = self._each(lambda part: part.to(device))
        if moved.pixels is None or moved.pixels.dtype != torch.uint8:
            return moved
        assert self.mean_std is not None
        mean, std = self.mean_std.to(device)[:, :, None, None]
        pixels = (moved.pixels.float() / 255).sub_(mean).div_(std)
        return replace(moved, pixels=pixels, mean_std=None)

    @staticmethod
    def cat(parts: Sequence[Inputs]) -> Inputs:
        """Concatenate sets along the first axis."""
        return _join(parts, torch.cat)

    @staticmethod
    def padded(parts: Sequence[Inputs]) -> Inputs:
        """Stack the sets of K clients as (K, longest, ...), padding shorter ones with zeros."""
        return _join(parts, lambda tensors: pad_sequence(tensors, batch_first=True))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        parts = {n: change(part) for n, part in self.columns().items() if n != COMMON}
        return Inputs(**parts, mean_std=self.mean_std)


def _join(parts: Sequence[Inputs], how: Callable[[list[Tensor]], Tensor]) -> Inputs:
    # All parts were read for the same method, so a column is in all of them or in none.
    names = [name for name in parts[0].columns() if name != COMMON]
    joined = {name: how([getattr(part, name) for part in parts]) for name in names}
    return Inputs(**joined, mean_std=parts[0].mean_std)
