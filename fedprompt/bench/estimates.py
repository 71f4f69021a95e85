"""The estimated memory of a training step beside the measured one; block sizes depend on it.

A method that does not train is compared in its evaluation. Measured is the largest number of bytes
in tensors that exist at one time while one client reads its images and takes one step, counted by
PyTorch's dispatcher (`runtime/allocations.py`). Weights are part of neither number.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.layer_statistics import StatisticsEncoder
from fedprompt.bench.backbones import random_clip
from fedprompt.bench.class_lists import class_names
from fedprompt.bench.output import Column, Output
from fedprompt.bench.workload import Sizes, make_workspace
from fedprompt.methods.registry import method_class
from fedprompt.runtime.allocations import Allocations
from fedprompt.scoring import encode_personal, score_each
from fedprompt.simulation.step_memory import step_memory
from fedprompt.training import train_clients
from fedprompt.workspace import Workspace

MB = 1e6
COLUMNS: tuple[Column, ...] = (
    ("method", "method", ""),
    ("tensors MB", "tensors_mb", ".1f"),
    ("inputs MB", "inputs_mb", ".1f"),
    ("kept by prompts MB", "kept_by_prompts_mb", ".1f"),
    ("kept by images MB", "kept_by_images_mb", ".1f"),
    ("working MB", "working_mb", ".1f"),
    ("estimate MB", "estimate_mb", ".1f"),
    ("measured MB", "measured_mb", ".1f"),
    ("ratio", "ratio", ".2f"),
)


@dataclass(frozen=True)
class EstimateOptions:
    """What `bench estimates` compares.

    Attributes:
        methods: the methods, with their default options.
        backbone: the architecture.
        classes: number of classes.
        images: training images of the client.
        batch: images of a step.
    """

    methods: Sequence[str]
    backbone: str = "ViT-B-16"
    classes: int = 10
    images: int = 8
    batch: int = 8


def bench_estimates(options: EstimateOptions, out: Output) -> None:
    """Compare the estimate of one client's step with a measured one, method by method.

    Args:
        options: methods and sizes.
        out: where rows go.

    Raises:
        UserError: a method is not known, or does not fit the backbone.
    """
    clip = random_clip(options.backbone)
    for name in options.methods:
        out.progress(name)
        workspace = workspace_of(clip, name, options)
        estimate = step_memory(workspace)
        assert estimate is not None
        parts = ("tensors", "inputs", "kept_by_prompts", "kept_by_images", "working")
        trains = workspace.method.trainable
        expected = estimate.training if trains else estimate.evaluation
        measured = measured_step(workspace) if trains else measured_evaluation(workspace)
        shown = {f"{part}_mb": getattr(estimate, part) / MB if trains else None for part in parts}
        out.add(
            {
                "method": name if trains else f"{name} (evaluation)",
                **shown,
                "estimate_mb": expected / MB,
                "measured_mb": measured / MB,
                "ratio": expected / measured,
            }
        )
    out.table(COLUMNS)


def workspace_of(
    clip: FrozenCLIP,
    name: str,
    options: EstimateOptions,
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> Workspace:
    """One client with random features, patches and pixels, as far as the method needs them.

    Args:
        clip: the backbone.
        name: the method.
        options: sizes.
        settings: options of the method; those that are not named have their defaults.
    """
    cls = method_class(name)
    workspace = make_workspace(
        clip,
        class_names(options.classes),
        Sizes(1, options.images, 1, 1),
        method={"name": name, **settings},
        strategy=dict(cls.Config().default_strategy),
        training={"batch_size": options.batch, "lr": 0.01},
    )
    size, needs = clip.model.visual.image_size, workspace.method.needs
    height, width = size if isinstance(size, tuple) else (size, size)
    draw = np.random.default_rng(1)
    (table,), count = workspace.views, options.images + 2
    patches = pixels = statistics = None
    if "patches" in needs:
        per_image = clip.model.visual.positional_embedding.shape[0] - 1
        patches = draw.standard_normal((count, per_image, clip.embed_dim), dtype=np.float32)
    if "pixels" in needs:
        pixels = draw.integers(0, 256, (count, 3, height, width), dtype=np.uint8)
    if "statistics" in needs:
        shape = StatisticsEncoder(clip).shape
        statistics = np.abs(draw.standard_normal((count, *shape), dtype=np.float32))
    workspace.views = (
        replace(
            table,
            patches_NPD=patches,
            pixels_N3HW=pixels,
            mean_std=clip.mean_std,
            statistics_NL2w=statistics,
        ),
    )
    return workspace


def measured_step(workspace: Workspace) -> int:
    """Bytes at the peak of one client's first step.

    Args:
        workspace: one client, whose images are one batch.
    """
    gc.collect()
    with Allocations() as made:
        first_step(workspace)
    return made.peak


def first_step(workspace: Workspace) -> None:
    """One client reads its images and takes its first step, on all of them.

    Args:
        workspace: one client, whose images are one batch.
    """
    config, method = workspace.config, workspace.method
    train_clients(
        method,
        [method.init_shared(config.seed) | method.init_extras(config.seed)],
        [workspace.start_private(0)],
        [workspace.train_data(0)],
        replace(config.training, local_epochs=1),
        seed=config.seed,
        server_round=1,
        rounds=config.federation.rounds,
    )


def measured_evaluation(workspace: Workspace) -> int:
    """Bytes at the peak of one client's evaluation.

    Args:
        workspace: one client.
    """
    method, seed = workspace.method, workspace.config.seed
    shared = method.init_shared(seed) | method.init_extras(seed)
    gc.collect()
    with Allocations() as made:
        encoded = encode_personal(method, [shared], [workspace.start_private(0)])
        score_each(method, encoded, [workspace.test_data(0)])
    return made.peak
