"""Weights as people have them: what a file holds, as plain tensors by name.

Published checkpoints are pickles or safetensors files, archives of TorchScript (OpenAI's own), or
several files with an index. Their tensors may lie inside a dict of a training run, and their names
may carry the prefixes of PyTorch's wrappers.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fedprompt.backbone.model_folder import INDEX, shards

WRAPPED = ("state_dict", "model_state_dict", "model", "module", "clip")
"""Keys below which training code keeps the model's tensors, the most specific first."""
PREFIXES = ("module.", "_orig_mod.", "model.", "clip.", "clip_model.")
"""What wrappers put before every name: DataParallel, torch.compile, Lightning and others."""
CONSTANTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")
"""What archives of TorchScript hold as tensors besides the weights."""


def files_of(source: Path) -> list[Path]:
    """The files of a checkpoint: the file itself, or an index and the files that it names.

    Raises:
        UserError: the index is damaged, or names a file elsewhere.
    """
    return [source, *shards(source)] if source.name.endswith(INDEX) else [source]


def read_tensors(source: Path) -> dict[str, Tensor]:
    """Read all tensors of a checkpoint.

    Args:
        source: a checkpoint file, or the index of several.

    Returns:
        Tensors on the CPU by name, without common prefixes.

    Raises:
        Exception: the file cannot be read; PyTorch's and safetensors' errors have no common parent.
        ValueError: it holds no tensors.
    """
    if source.name.endswith(INDEX):
        content: Any = {k: v for shard in shards(source) for k, v in load_file(shard).items()}
    elif source.suffix == ".safetensors":
        content = load_file(source)
    elif _is_torchscript(source):
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            # Deprecated for new models; OpenAI's files stay as they are.
            content = torch.jit.load(source, map_location="cpu").state_dict()
        content = {k: v for k, v in content.items() if k not in CONSTANTS}
    else:
        # weights_only: a pickle could otherwise execute code when it is opened.
        content = torch.load(source, map_location="cpu", weights_only=True)
    return _without_prefixes(_unwrapped(content))


def _is_torchscript(source: Path) -> bool:
    if not zipfile.is_zipfile(source):
        return False
    with zipfile.ZipFile(source) as archive:
        return any(re.fullmatch(r"[^/]+/constants\.pkl", name) for name in archive.namelist())


def _unwrapped(content: Any) -> dict[str, Tensor]:
    """The tensors by name, from inside the dicts of a training run."""
    while isinstance(content, Mapping):
        tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
        if len(tensors) > 1:
            return tensors
        key = next((k for k in WRAPPED if isinstance(content.get(k), Mapping)), None)
        if key is None:
            break
        content = content[key]
    raise ValueError("it holds no tensors by name, as a state_dict does.")


def _without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    while True:
        common = next((p for p in PREFIXES if all(name.startswith(p) for name in state)), None)
        if common is None:
            return state
        state = {name.removeprefix(common): tensor for name, tensor in state.items()}
