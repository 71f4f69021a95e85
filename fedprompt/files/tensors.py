"""Tensors as bytes, and in safetensors files that carry the SHA-256 of their content.

Checkpoints of a server and private tensors of a node are written and read here. A damaged file is
refused, because a flipped bit in a tensor would not be noticed otherwise: the numbers are only a
little wrong.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

CHECKSUM = "sha256"
"""The key of the checksum in a file's metadata."""


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Compute the SHA-256 of tensors and metadata.

    Args:
        tensors: tensors by name.
        metadata: texts by name.

    Returns:
        64 hexadecimal digits. Without metadata they depend on the tensors only.
    """
    hashed = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        # Names, types and shapes are hashed too, because the same bytes may mean other tensors.
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        hashed.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    for name, text in sorted((metadata or {}).items()):
        # The lengths keep two different lists of texts from being the same bytes.
        hashed.update(f"{name} {len(text)} {text}\n".encode())
    return hashed.hexdigest()


def array_checksum(arrays: Mapping[str, NDArray[Any]]) -> str:
    """Compute the SHA-256 of arrays, with their names, types and shapes.

    Args:
        arrays: arrays by name.

    Returns:
        64 hexadecimal digits, which differ from `checksum` of equal tensors.
    """
    hashed = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        hashed.update(f"{name} {array.dtype} {array.shape}\n".encode())
        hashed.update(array.tobytes())
    return hashed.hexdigest()


def to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Serialise tensors as the content of a safetensors file with a checksum.

    Args:
        tensors: tensors by name, contiguous, no two of which share memory.
        metadata: texts for the header of the file.

    Returns:
        The content of the file.
    """
    texts = dict(metadata or {})
    content: bytes = save(dict(tensors), metadata={**texts, CHECKSUM: checksum(tensors, texts)})
    return content


def read_tensors(path: Path, *, required: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file, and verify it if it carries a checksum.

    Args:
        path: the file.
        required: whether a file without a checksum is refused. Files of older versions have none.

    Returns:
        The tensors by name, on the CPU, and the file's metadata without the checksum.

    Raises:
        ValueError: the file is no safetensors file, or its checksum does not match or is missing.
            The text is the reason alone; what to do depends on the file.
        OSError: the file is missing or cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as reader:
            # The reader is not a mapping and can only be iterated through `keys`.
            tensors = {k: reader.get_tensor(k) for k in reader.keys()}  # noqa: SIM118
            metadata = dict(reader.metadata() or {})
    except SafetensorError as error:
        raise ValueError(" ".join(str(error).split())) from None
    stored = metadata.pop(CHECKSUM, None)
    if (required or stored is not None) and stored != checksum(tensors, metadata):
        raise ValueError("its checksum does not match")
    return tensors, metadata


def to_npy(tensor: Tensor) -> bytes:
    """A tensor with its type and shape, as the content of an .npy file."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, tensor.detach().cpu().contiguous().numpy())
    return stream.getvalue()


def from_npy(content: bytes) -> Tensor:
    """The tensor that `to_npy` has written.

    Raises:
        ValueError: the content is no such file.
    """
    array: NDArray[Any] = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    return torch.from_numpy(array)
