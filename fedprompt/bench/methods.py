"""What a client's training step costs with different methods, beside the first of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedprompt.bench.backbones import random_clip
from fedprompt.bench.compare import interleave, row
from fedprompt.bench.estimates import MB, EstimateOptions, first_step, measured_step, workspace_of
from fedprompt.bench.output import Column, Output
from fedprompt.errors import UserError
from fedprompt.workspace import Workspace

COLUMNS: tuple[Column, ...] = (
    ("method", "case", ""),
    ("numbers up", "numbers_up", ",d"),
    ("s per step", "ours_s", ".4g"),
    ("x the first", "times", ".2f"),
    ("tensors MB", "measured_mb", ".1f"),
)
COMPARED = (
    "promptfl",
    "fedrsclip",
    "vpt",
    "fedmaple",
    "lora",
    "lora sharing=ffa",
    "lora image_layers=12",
)
"""Prompts and low-rank adapters, in the text tower, in the image tower, and in both."""


@dataclass(frozen=True)
class MethodsOptions:
    """What `bench methods` compares.

    Attributes:
        methods: names of methods, each with options behind it, as in `lora image_layers=12`.
        sizes: the backbone, the classes, and the images of the client's one step.
        repeats: the largest number of steps of each method.
        budget_s: seconds after which no further repeat starts.
        device: where.
    """

    methods: Sequence[str]
    sizes: EstimateOptions
    repeats: int
    budget_s: float
    device: str = "cpu"


def bench_methods(options: MethodsOptions, out: Output) -> None:
    """Measure one client's step with every method, in turn, and its largest memory.

    The images have been encoded before, as in a run: a step passes through the image tower only
    where the method trains something inside of it.

    Args:
        options: methods and sizes.
        out: where rows go.

    Raises:
        UserError: a method is not known or does not train, or an option is wrong.
    """
    clip = random_clip(options.sizes.backbone, device=options.device)
    spaces: dict[str, Workspace] = {}
    for text in options.methods:
        name, settings = parse_method(text)
        spaces[text] = workspace_of(clip, name, options.sizes, settings)
        if not spaces[text].method.trainable:
            raise UserError(f"bench methods: method '{name}' trains nothing, so it has no step.")
    peaks = {}
    for text, workspace in spaces.items():
        out.progress(text)
        # It is the warm-up as well.
        peaks[text] = measured_step(workspace)
    jobs = {text: (lambda repeat, w=workspace: first_step(w)) for text, workspace in spaces.items()}
    measured = interleave(jobs, repeats=options.repeats, budget_s=options.budget_s)
    first = measured[options.methods[0]]
    for text, workspace in spaces.items():
        out.add(
            row(
                text,
                measured[text],
                first,
                times=measured[text].best / first.best,
                numbers_up=sum(math.prod(s) for s in workspace.shared_shapes.values()),
                measured_mb=peaks[text] / MB,
            )
        )
    out.table(COLUMNS)


def parse_method(text: str) -> tuple[str, dict[str, Any]]:
    """A method's name and options.

    Args:
        text: for example `lora sharing=ffa image_layers=12`.

    Raises:
        UserError: there is no name, or something behind it is not `key=value`.
    """
    name, *options = text.split() or [""]
    if not name or not all("=" in option for option in options):
        raise UserError(f"bench methods: '{text}' is not a method's name with options key=value.")
    try:
        settings = OmegaConf.to_container(OmegaConf.from_dotlist(options))
    except OmegaConfBaseException as error:
        raise UserError(f"bench methods: '{text}': {error}") from None
    assert isinstance(settings, dict)
    return name, {str(key): value for key, value in settings.items()}
