"""Reading the checkpoints and tensor files of a run folder.

The server reads its checkpoint to resume a run; `predict` reads both kinds of files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fedprompt.errors import DamagedFile, UserError
from fedprompt.federation.checkpoint import Checkpoint
from fedprompt.files import tensors
from fedprompt.files.checksums import read_verified


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
        named, header = read_tensors(path)
        groups: dict[str, dict[str, Tensor]] = {"shared": {}, "strategy": {}, "flight": {}}
        for key, tensor in named.items():
            group, _, name = key.partition("/")
            groups[group][name] = tensor
        return Checkpoint(
            int(header["round"]),
            groups["shared"],
            groups["strategy"],
            totals=json.loads(header["totals"]),
            private=header["private"],
            # Earlier versions have what is known about single clients among the strategy's state.
            clients=header.get("clients", ""),
            trained=header.get("trained", ""),
            flight=groups["flight"],
        )
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{path} is not a fedprompt checkpoint ({error}); remove it to start over."
        ) from None


def checkpoint_bytes(checkpoint: Checkpoint, metadata: Mapping[str, str]) -> bytes:
    """Serialise a checkpoint for `RunFolder.save_checkpoint`.

    Args:
        checkpoint: the checkpoint.
        metadata: further texts for the header of the file.
    """
    groups = {
        "shared": checkpoint.shared,
        "strategy": checkpoint.strategy,
        "flight": checkpoint.flight,
    }
    # Cloned, since safetensors refuses tensors that share memory, as a strategy's may.
    named = {
        f"{group}/{name}": tensor.detach().contiguous().clone()
        for group, of_group in groups.items()
        for name, tensor in of_group.items()
    }
    header = {
        "round": str(checkpoint.server_round),
        "totals": json.dumps(checkpoint.totals),
        "private": checkpoint.private,
        **({"clients": checkpoint.clients} if checkpoint.clients else {}),
        **({"trained": checkpoint.trained} if checkpoint.trained else {}),
    }
    return tensors.to_bytes(named, {**header, **metadata})


def read_header(path: Path) -> dict[str, str]:
    """Read the metadata of a checkpoint: round, totals, config, digests.

    Raises:
        UserError: the file is missing or damaged.
    """
    return read_tensors(path)[1]


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read and verify a safetensors file of a run folder.

    Args:
        path: the file.

    Returns:
        The tensors by name, on the CPU, and the file's metadata.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        read_verified(path)
        return tensors.read_tensors(path)
    except FileNotFoundError:
        raise UserError(f"no file {path}.") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from None
    except ValueError as error:
        raise DamagedFile(
            f"{path} is damaged ({error}); remove it to start from the beginning."
        ) from None
