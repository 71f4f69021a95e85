"""Weights in fewer bits against float32: accuracy, memory and time, in one process.

Accuracy is that of hand-written prompts on the embedded data, through the embedded backbone. Memory
and time are those of an architecture with random weights: the bytes of all weights, the time to
encode a batch of images, and that of the class features of learned prompts with the gradient of the
prompts. Random weights are as fast as trained ones.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.compression import Compression, weight_bytes
from fedprompt.backbone.loading import load_clip
from fedprompt.backbone.text_tower import TextTower
from fedprompt.bench.backbones import random_clip, random_images
from fedprompt.bench.class_lists import class_names
from fedprompt.bench.compare import interleave, row
from fedprompt.bench.output import Column, Output
from fedprompt.config.schema import FORMATS, BackboneConfig
from fedprompt.data import open_dataset
from fedprompt.data.dataset import TEST
from fedprompt.data.sources.aerial_scenes import AerialScenesConfig
from fedprompt.errors import UserError, did_you_mean
from fedprompt.rng import normal

COLUMNS: tuple[Column, ...] = (
    ("weights", "case", ""),
    ("weights MB", "weights_mb", ".1f"),
    ("smaller", "memory_ratio", ".2f"),
    ("images s", "images_s", ".3g"),
    ("faster", "images_ratio", ".2f"),
    ("prompts s", "ours_s", ".3g"),
    ("faster", "ratio", ".2f"),
    ("cosine", "cosine", ".4f"),
    ("accuracy", "accuracy", ".4f"),
    ("change", "accuracy_change", "+.4f"),
)


@dataclass(frozen=True)
class PrecisionOptions:
    """What `bench backbone` measures."""

    forms: Sequence[Compression]
    backbone: str = "ViT-B-16"
    classes: int = 10
    context: int = 4
    batch: int = 8
    images_per_class: int = 20
    repeats: int = 3
    budget_s: float = 30.0
    device: str = "cpu"


def forms(weights: str, pruned: float) -> list[Compression]:
    """Parse formats, `int8,int4`, and add a pruned model if `pruned` is not 0.

    Raises:
        UserError: a format is unknown, or its library is not installed.
    """
    found = []
    for name in weights.split(","):
        known = next((form for form in FORMATS if form == name.strip()), None)
        if known is None:
            raise UserError(f"--weights {name}: not known.{did_you_mean(name, FORMATS)}")
        found.append(Compression(known))
    if pruned:
        found.append(Compression(pruned=pruned))
    for form in found:
        form.check()
    # The one that all others are compared with.
    return [Compression(), *(form for form in found if form)]


def bench_precision(options: PrecisionOptions, out: Output) -> None:
    """Measure all forms.

    Args:
        options: what to measure.
        out: where rows and notes go.
    """
    runs: dict[str, Callable[[int], object]] = {}
    sizes: dict[str, int] = {}
    for form in options.forms:
        out.progress(f"{options.backbone} with weights in {form}")
        clip = random_clip(options.backbone, device=options.device, compression=form)
        sizes[str(form)] = weight_bytes(clip.model)
        runs[f"images {form}"] = _images(clip, options.batch)
        runs[f"prompts {form}"] = _prompts(clip, options)
    out.progress("time")
    times = interleave(
        runs, repeats=options.repeats, budget_s=options.budget_s, warm_up=tuple(runs)
    )
    out.progress("accuracy of hand-written prompts on the embedded data")
    whole = _accuracy(Compression(), options)
    for form in options.forms:
        accuracy, image_ND = _accuracy(form, options) if form else whole
        images, reference = times[f"images {form}"], times["images float32"]
        line = row(str(form), times[f"prompts {form}"], times["prompts float32"])
        out.add(
            {
                **line,
                "weights_mb": sizes[str(form)] / 1e6,
                "memory_ratio": sizes["float32"] / sizes[str(form)],
                "images_s": images.best,
                "images_ratio": reference.best / images.best,
                "cosine": float(torch.cosine_similarity(image_ND, whole[1]).mean()),
                "accuracy": accuracy,
                "accuracy_change": accuracy - whole[0],
            }
        )
    out.table(COLUMNS)
    out.note(
        f"memory and time: {options.backbone} with random weights, {options.batch} images, "
        f"{options.classes} classes, as multiples of float32. Accuracy of hand-written prompts and "
        "cosine (mean, of image features with those of float32): the embedded backbone and data."
    )


def _images(clip: FrozenCLIP, batch: int) -> Callable[[int], object]:
    pixels = random_images(clip, batch, seed=0)
    return lambda _: clip.encode_images(pixels)


def _prompts(clip: FrozenCLIP, options: PrecisionOptions) -> Callable[[int], object]:
    tower = TextTower(clip, class_names(options.classes), options.context)
    shape = (options.context, clip.text.width)
    context_Md = normal(shape, 0.02, 0, "bench", "prompts").to(clip.device).requires_grad_()

    def run(_: int) -> Tensor:
        features_CD = tower(context_Md)
        return torch.autograd.grad(features_CD.sum(), context_Md)[0]

    return run


def _accuracy(form: Compression, options: PrecisionOptions) -> tuple[float, Tensor]:
    """Accuracy of the templates through the embedded backbone, and the images' features."""
    data = AerialScenesConfig(images_per_class=options.images_per_class)
    config = BackboneConfig(
        device=options.device,  # type: ignore[arg-type]
        weights=form.weights,
        pruned=form.pruned,
    )
    with tempfile.TemporaryDirectory(prefix="fedprompt-bench-") as folder:
        clip = load_clip(config, Path(folder))
        dataset = open_dataset(data, 0, Path(folder))
        tests = (dataset.split_N == TEST).nonzero()[0]
        pixels = torch.stack([clip.preprocess(dataset.open_image(int(i))) for i in tests])
    parts = [clip.encode_images(part) for part in pixels.split(clip.image_batch)]
    image_ND = torch.nn.functional.normalize(torch.cat(parts), dim=-1)
    classes_CD = clip.zero_shot_classifier(dataset.class_names, data.templates).cpu()
    answers_N = (image_ND @ classes_CD.T).argmax(1).numpy()
    return float((answers_N == dataset.labels_N[tests]).mean()), image_ND
