"""Which device a config means, and sums in a fixed order on a GPU. No test needs one."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fedprompt.backbone import devices
from fedprompt.backbone.devices import ordered_sums, use_precision
from fedprompt.backbone.loading import load_clip
from fedprompt.config.schema import BackboneConfig, Config
from fedprompt.errors import UserError
from fedprompt.experiment import run as experiment
from fedprompt.experiment.display import QuietDisplay
from fedprompt.runtime import CUBLAS_WORKSPACE
from tests.support.builders import small_config

ASKED = BackboneConfig(device="cuda", deterministic=True)


def settings() -> tuple[bool, ...]:
    """What `ordered_sums` changes in the process."""
    cuda = torch.backends.cuda
    return (
        torch.are_deterministic_algorithms_enabled(),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
    )


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU, on which CUDA has not started yet."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setenv(CUBLAS_WORKSPACE, ":4096:8")


@pytest.mark.usefixtures("card")
def test_sums_are_ordered_inside_the_block_only() -> None:
    before = settings()
    with ordered_sums(ASKED):
        assert settings() == (True, False, False, True)
    assert settings() == before
    with pytest.raises(ZeroDivisionError), ordered_sums(ASKED):
        raise ZeroDivisionError
    assert settings() == before


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("changes", [{"device": "cpu"}, {"deterministic": False}])
def test_nothing_changes_on_a_cpu_or_without_the_option(changes: dict[str, Any]) -> None:
    before = settings()
    with ordered_sums(replace(ASKED, **changes)):
        assert settings() == before


@pytest.mark.usefixtures("card")
def test_a_workspace_without_a_promise_is_replaced_before_cuda_starts_and_refused_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(CUBLAS_WORKSPACE, ":4096:2:16:8")
    with ordered_sums(ASKED):
        assert os.environ[CUBLAS_WORKSPACE] == ":4096:8"
    monkeypatch.setenv(CUBLAS_WORKSPACE, ":4096:2:16:8")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(UserError, match=f"{CUBLAS_WORKSPACE}=:4096:8"), ordered_sums(ASKED):
        pass


def test_a_run_trains_with_ordered_sums_and_leaves_the_process_as_it_was(
    run_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Only the settings take the CPU for a GPU; the backbone does not.
    monkeypatch.setattr(devices, "pick_device", lambda requested: "mps")
    before, seen = settings(), []
    run_server = experiment.run_server

    def watched(*arguments: Any) -> Any:
        seen.append(settings())
        return run_server(*arguments)

    monkeypatch.setattr(experiment, "run_server", watched)
    config = run_config(backbone={"deterministic": True, "device": "cpu"}, federation={"rounds": 1})
    experiment.run(config, QuietDisplay(Console(quiet=True)))
    assert seen == [(True, False, False, True)]
    assert settings() == before


def test_an_absent_device_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for device in ("cuda", "mps", "tpu"):
        with pytest.raises(UserError, match=f"'{device}'"):
            devices.pick_device(device)
    assert devices.pick_device("auto") == "cpu"


@pytest.mark.parametrize(
    ("method", "refused"),
    [
        ({"name": "promptfl"}, False),
        ({"name": "plot", "eps": 0.1}, False),
        ({"name": "plot", "eps": 0.02}, True),
        ({"name": "fedotp", "eps": 0.01}, True),
        ({"name": "fedpha"}, True),
        ({"name": "scaffold"}, True),
        ({"name": "ditto", "base": "fedotp", "options": {"eps": 0.01}}, True),
    ],
)
def test_methods_in_float64_are_refused_on_mps(method: dict[str, Any], refused: bool) -> None:
    def make(device: str) -> Config:
        return small_config(method=method, strategy={"name": "auto"}, backbone={"device": device})

    make("cpu")
    if refused:
        with pytest.raises(UserError, match=f"'{method['name']}'.*mps"):
            make("mps")
    else:
        assert make("mps").backbone.device == "mps"


def test_tf32_is_set_for_cuda_and_refused_elsewhere() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        use_precision("tf32", "cuda")
        assert torch.get_float32_matmul_precision() == "high"
        use_precision("float32", "cuda")
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)
    with pytest.raises(UserError, match="tf32"):
        use_precision("tf32", "cpu")
    with pytest.raises(UserError, match="tf32"):
        load_clip(BackboneConfig(device="cpu", precision="tf32"), Path())
