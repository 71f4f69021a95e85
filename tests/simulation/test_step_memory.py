"""The estimated memory of one client against a counted step, and what it decides."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from flwr.app import MessageType

from fedprompt.backbone import text_sequences
from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.bench.estimates import (
    EstimateOptions,
    measured_evaluation,
    measured_step,
    workspace_of,
)
from fedprompt.errors import UserError
from fedprompt.methods.parts import prompts
from fedprompt.simulation.blocks import choose_size
from fedprompt.simulation.inline_grid import InlineGrid
from fedprompt.simulation.step_memory import StepMemory, step_memory
from fedprompt.workspace import Workspace

MakeWorkspace = Callable[..., Workspace]


def sized(clip: FrozenCLIP, name: str) -> tuple[Workspace, StepMemory]:
    workspace = workspace_of(clip, name, EstimateOptions([name], classes=10, images=8, batch=8))
    need = step_memory(workspace)
    assert need is not None
    return workspace, need


@pytest.mark.parametrize(
    "name", ["promptfl", "coop_csc", "fedotp", "cocoop", "vpt", "pfedmma", "pfedprompt"]
)
def test_the_estimate_is_close_to_a_counted_step(clip: FrozenCLIP, name: str) -> None:
    workspace, need = sized(clip, name)
    assert 0.9 < need.training / measured_step(workspace) < 2


@pytest.mark.parametrize("name", ["coop_csc", "proda"])
def test_parts_that_are_computed_again_count(
    clip: FrozenCLIP, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Long class lists keep no activations; those of one part exist during the backward pass."""
    monkeypatch.setattr(text_sequences, "BYTES_AT_ONCE", {"cpu": 2**20})
    monkeypatch.setattr(prompts, "POSITIONS_AT_ONCE", 300)
    workspace = workspace_of(clip, name, EstimateOptions([name], classes=60, images=4, batch=4))
    need = step_memory(workspace)
    assert need is not None
    assert 0.9 < need.training / measured_step(workspace) < 2


def test_a_memory_without_training_is_counted_in_evaluation(clip: FrozenCLIP) -> None:
    workspace, need = sized(clip, "tip_adapter")
    assert 0.9 < need.evaluation / measured_evaluation(workspace) < 3


def test_every_image_of_a_batch_counts(clip: FrozenCLIP) -> None:
    workspace, eight = sized(clip, "vpt")
    training = replace(workspace.config.training, batch_size=4)
    workspace.config = replace(workspace.config, training=training)
    four = step_memory(workspace)
    assert four is not None
    assert eight.kept_by_images == 2 * four.kept_by_images
    assert eight.kept_by_prompts == four.kept_by_prompts


def test_the_trial_is_not_counted_as_work(clip: FrozenCLIP) -> None:
    workspace = workspace_of(clip, "maple", EstimateOptions(["maple"], classes=7))
    before = clip.positions_encoded
    assert step_memory(workspace) is not None
    assert workspace.tokens_per_client > workspace.prompt_tokens_per_client > 0
    assert clip.positions_encoded == before


@pytest.mark.parametrize(
    ("name", "threads", "size"),
    # Frozen: another size would change the last bits of every run at default settings.
    [("promptfl", 1, 10), ("fedrsclip", 1, 5), ("fedrsclip", 2, 10)],
)
def test_small_runs_keep_their_block_sizes(
    make_workspace: MakeWorkspace, name: str, threads: int, size: int
) -> None:
    workspace = make_workspace(method={"name": name}, partition={"clients": 10})
    need = step_memory(workspace)
    for free, client_bytes in ((math.inf, 0.0), (1e9, need.training if need else 0.0)):
        assert choose_size(workspace, 10, 1, free, threads, client_bytes=client_bytes) == size


def test_an_evaluation_has_blocks_of_its_own(clip: FrozenCLIP) -> None:
    """Only its prompts count, since images are scored a bounded number at a time."""
    workspace, need = sized(clip, "vpt")
    assert need.evaluation < need.training / 5
    training, evaluation = (
        choose_size(workspace, 8, 1, math.inf, 1, kind=kind)
        for kind in (MessageType.TRAIN, MessageType.EVALUATE)
    )
    assert (training, evaluation) == (1, 8)
    # Memory bounds them as well.
    assert choose_size(workspace, 8, 1, 3e6, 1, kind=MessageType.EVALUATE, client_bytes=1e6) == 1


def test_a_run_of_which_no_client_fits_is_refused_with_the_numbers(clip: FrozenCLIP) -> None:
    workspace, need = sized(clip, "vpt")
    grid = InlineGrid(workspace)
    grid.check_memory()
    grid._free_bytes = need.training / 2
    with pytest.raises(UserError) as caught:
        grid.check_memory()
    text = str(caught.value)
    for part in ("'vpt'", "training.batch_size=8", "method.depth", "clients_per_block=1"):
        assert part in text
    assert f"about {need.training / 1e9:.1f} GB" in text


def test_a_configured_block_size_is_tried_whatever_the_estimate(
    make_workspace: MakeWorkspace,
) -> None:
    grid = InlineGrid(make_workspace(simulation={"clients_per_block": 1}))
    grid._free_bytes = 1.0
    grid.check_memory()


def test_a_trial_that_does_not_fit_is_refused(
    clip: FrozenCLIP, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = workspace_of(clip, "promptfl", EstimateOptions(["promptfl"], classes=5))

    def short(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(workspace.method, "encode", short)
    need = step_memory(workspace)
    assert need is not None
    assert need.training == math.inf
    grid = InlineGrid(workspace)
    with pytest.raises(UserError, match="more than that"):
        grid.check_memory()


def test_a_method_that_fails_is_left_to_its_clients(
    clip: FrozenCLIP, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = workspace_of(clip, "promptfl", EstimateOptions(["promptfl"], classes=4))

    def faulty(*_: Any) -> Any:
        raise ValueError("a fault of the method")

    monkeypatch.setattr(workspace.method, "loss_terms", faulty)
    assert step_memory(workspace) is None
    InlineGrid(workspace).check_memory()
