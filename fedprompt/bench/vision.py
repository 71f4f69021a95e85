"""Image features under visual prompts, and the gradient of the prompts.

Ours is the fast path of `vision_transformer.py`; the reference is autograd through open_clip's own
blocks. Both compute the same K clients with B images each in one call.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.vision_tower import VisionTower
from fedprompt.bench.backbones import random_images
from fedprompt.bench.compare import Row, interleave, max_rel_diff, require_equal, row
from fedprompt.bench.counting import count_gflop
from fedprompt.bench.output import TIMES, Column, Output
from fedprompt.errors import UserError
from fedprompt.rng import normal

COLUMNS: tuple[Column, ...] = (
    *(("ratio", "ratio", ".2f") if column[0] == "ratio" else column for column in TIMES),
    ("ref. MB", "reference_peak_mb", ".0f"),
    ("counted", "counted_ratio", ".2f"),
)


@dataclass(frozen=True)
class VisionOptions:
    """What `bench vision` measures; `prompts` are (tokens, layers with prompts)."""

    prompts: Sequence[tuple[int, int]] = ((4, 1), (4, 9), (8, 12))
    clients: int = 1
    batch: int = 8
    patches: bool = False
    repeats: int = 3
    budget_s: float = 30.0


def prompt_shapes(text: str) -> tuple[tuple[int, int], ...]:
    """Parse prompt shapes: `4x1,8x12` -> ((4, 1), (8, 12)).

    Raises:
        UserError: `text` is not a list of TOKENSxLAYERS, separated by commas.
    """
    matches = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", part) for part in text.split(",")]
    if not all(matches):
        raise UserError(f"'{text}': give tokens x layers, separated by commas, e.g. 4x1,8x12.")
    return tuple((int(match[1]), int(match[2])) for match in matches if match)


def bench_vision(clip: FrozenCLIP, options: VisionOptions, out: Output) -> None:
    """Measure all cases.

    Args:
        clip: the frozen backbone.
        options: what to measure.
        out: where rows and notes go.

    Raises:
        MismatchError: a feature or gradient of ours differs from the reference's.
        UserError: prompts are asked for in more layers than the tower has.
    """
    # Two towers on one CLIP, so that they differ in the path only.
    ours, reference = VisionTower(clip), VisionTower(clip)
    reference.fast = False
    lead = (options.clients, options.batch)
    pixels = random_images(clip, lead[0] * lead[1], seed=0).unflatten(0, lead).to(clip.device)
    for tokens, depth in options.prompts:
        if depth > ours.layers:
            raise UserError(
                f"--prompts {tokens}x{depth}: the image tower has {ours.layers} layers."
            )
        name = f"vision M={tokens} J={depth} K={lead[0]} B={lead[1]}"
        out.progress(name)
        shape = (options.clients, depth, tokens, ours.width)
        prompts_KJMw = normal(shape, 0.02, 0, "bench", "visual prompts").to(clip.device)
        run = {
            "ours": _step(ours, pixels, prompts_KJMw, patches=options.patches),
            "reference": _step(reference, pixels, prompts_KJMw, patches=options.patches),
        }
        out.add(_compare(name, run, options))
    out.table(COLUMNS)


def _step(
    tower: VisionTower, pixels: Tensor, prompts_KJMw: Tensor, *, patches: bool
) -> Callable[[], dict[str, Tensor]]:
    """One forward and backward pass: features, patches and the prompts' gradient."""

    def step() -> dict[str, Tensor]:
        leaf = prompts_KJMw.clone().requires_grad_()
        deep = leaf[:, 1:] if leaf.shape[1] > 1 else None
        if patches:
            outputs = dict(
                zip(
                    ("features", "patches"),
                    tower(pixels, leaf[:, 0], deep, patches=True),
                    strict=True,
                )
            )
        else:
            outputs = {"features": tower(pixels, leaf[:, 0], deep)}
        # Random weights: a plain sum would hide errors that cancel out.
        weights = {n: normal(tuple(t.shape), 1.0, 0, "bench", n).to(t) for n, t in outputs.items()}
        torch.stack([(t * weights[n]).sum() for n, t in outputs.items()]).sum().backward()
        assert leaf.grad is not None
        return {n: t.detach() for n, t in outputs.items()} | {"gradient": leaf.grad}

    return step


def _compare(
    name: str, run: dict[str, Callable[[], dict[str, Tensor]]], options: VisionOptions
) -> Row:
    differences = []

    def check(repeat: int, results: dict[str, Any]) -> None:
        differences.append(max_rel_diff(results["ours"], results["reference"]))
        require_equal(name, differences[-1])

    gflop: dict[str, Any] = {f"{path}_gflop": count_gflop(step) for path, step in run.items()}
    measured = interleave(
        {"ours": lambda _: run["ours"](), "reference": lambda _: run["reference"]()},
        repeats=options.repeats,
        budget_s=options.budget_s,
        warm_up=("ours", "reference"),
        check=check,
    )
    return row(
        name,
        measured["ours"],
        measured["reference"],
        difference=max(differences),
        clients=options.clients,
        counted_ratio=gflop["reference_gflop"] / gflop["ours_gflop"],
        **gflop,
    )
