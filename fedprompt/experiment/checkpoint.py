"""Reading the checkpoints and tensor files of a run folder.

The server reads its checkpoint to resume a run; `predict` reads both kinds of files.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedprompt.errors import UserError
from fedprompt.federation.checkpoint import Checkpoint


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint that `RunFolder.save_checkpoint` wrote.

    Args:
        path: the file.

    Returns:
        The checkpoint, with its tensors on the CPU.

    Raises:
        UserError: the file is missing, damaged, or not a checkpoint.
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
            f"{path} is not a fedprompt checkpoint ({error}); remove it to start over."
        ) from None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file.

    Args:
        path: the file.

    Returns:
        The tensors by name, on the CPU, and the file's metadata.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as reader:
            # The reader is not a mapping and can only be iterated through `keys`.
            tensors = {k: reader.get_tensor(k) for k in reader.keys()}  # noqa: SIM118
            return tensors, dict(reader.metadata() or {})
    except FileNotFoundError:
        raise UserError(f"no file {path}.") from None
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path} is damaged ({reason}); remove it to start from the beginning."
        ) from None
