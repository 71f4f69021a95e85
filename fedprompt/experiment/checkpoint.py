"""Checkpoints and tensor files of a run folder, read back."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedprompt.errors import UserError
from fedprompt.federation.checkpoint import Checkpoint


def read_checkpoint(path: Path) -> Checkpoint:
    """What `save_checkpoint` wrote.

    Raises:
        UserError: missing or damaged.
    """
    try:
        tensors, header = read_tensors(path)
        groups: dict[str, dict[str, Tensor]] = {"shared": {}, "strategy": {}}
        for key, tensor in tensors.items():
            group, _, name = key.partition("/")
            groups[group][name] = tensor
        return Checkpoint(
            int(header["round"]),
            totals=json.loads(header["totals"]),
            private=header["private"],
            **groups,
        )
    except (KeyError, ValueError) as error:
        raise UserError(
            f"checkpoint {path} is not one of ours ({error}); remove it to start the run anew."
        ) from None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a safetensors file.

    Raises:
        UserError: missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as reader:
            return {k: reader.get_tensor(k) for k in reader.keys()}, dict(reader.metadata() or {})  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"no file {path}.") from None
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is damaged ({reason}); remove it to start anew.") from None
