"""The device that a config's `backbone` section names, and sums in a fixed order on it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedprompt.config.schema import BackboneConfig
from fedprompt.errors import UserError
from fedprompt.runtime import CUBLAS_WORKSPACE

KINDS = ("auto", "cpu", "cuda", "mps")
CUBLAS_ORDERED = (":4096:8", ":16:8")
"""The workspaces with which cuBLAS promises the same bits, as PyTorch documents them."""


def pick_device(requested: str) -> str:
    """The type of the device that `backbone.device` asks for on this machine.

    Args:
        requested: one of `KINDS`.

    Raises:
        UserError: there is no such kind of device, or PyTorch finds none of it.
    """
    if requested not in KINDS:
        raise UserError(f"device '{requested}' is not one of {', '.join(KINDS)}.")
    if requested == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "backbone: device is 'cuda', but PyTorch finds no GPU; use 'auto' or 'cpu'."
        )
    if requested == "mps" and not torch.backends.mps.is_available():
        raise UserError(
            "backbone: device is 'mps', but PyTorch finds no Apple GPU; use 'auto' or 'cpu'."
        )
    if requested == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return requested


def use_precision(precision: str, device: str) -> None:
    """Set how CUDA multiplies float32 matrices in this process: `tf32` rounds factors to 10 bits.

    Args:
        precision: `backbone.precision`.
        device: what `pick_device` returned.

    Raises:
        UserError: `tf32` on another device, where it would change nothing.
    """
    if precision == "tf32" and device != "cuda":
        raise UserError(
            f"backbone: precision 'tf32' is for NVIDIA GPUs, and the device is '{device}'; use "
            "'float32' or 'bf16'."
        )
    if device == "cuda":
        # Set in both cases: one process may run one experiment after another.
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


@contextlib.contextmanager
def ordered_sums(config: BackboneConfig) -> Iterator[None]:
    """Add in a fixed order inside the block, if `backbone.deterministic` asks for it.

    The settings are the process's. They are those from before when the block is left.

    Args:
        config: the `backbone` section.

    Raises:
        UserError: see `order_sums`.
    """
    restore = order_sums(config)
    try:
        yield
    finally:
        restore()


def order_sums(config: BackboneConfig) -> Callable[[], None]:
    """Make this process add in a fixed order from now on, if `backbone.deterministic` asks for it.

    PyTorch then uses its deterministic kernels, and attention is computed by plain matrix products,
    because the backward passes of fused kernels add in no fixed order. On a CPU, where the order
    is always the same, nothing is changed.

    Args:
        config: the `backbone` section.

    Returns:
        A function that restores the settings from before.

    Raises:
        UserError: there is no such device, or CUDA has already started in this process with a
            workspace that leaves the order open.
    """
    device = pick_device(config.device)
    if not config.deterministic or device == "cpu":
        return lambda: None
    if device == "cuda":
        _require_workspace()
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    settings = contextlib.ExitStack()
    settings.enter_context(sdpa_kernel(SDPBackend.MATH))
    settings.callback(torch.use_deterministic_algorithms, before, warn_only=warn_only)
    torch.use_deterministic_algorithms(True)
    return settings.close


def _require_workspace() -> None:
    """See to the variable that cuBLAS reads once, when CUDA starts.

    Raises:
        UserError: it is too late.
    """
    if os.environ.get(CUBLAS_WORKSPACE) in CUBLAS_ORDERED:
        return
    if torch.cuda.is_initialized():
        raise UserError(
            f"backbone: deterministic needs {CUBLAS_WORKSPACE}={CUBLAS_ORDERED[0]}, and CUDA has "
            "already started in this process; set the variable before Python starts."
        )
    os.environ[CUBLAS_WORKSPACE] = CUBLAS_ORDERED[0]
