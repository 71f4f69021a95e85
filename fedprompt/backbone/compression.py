"""A model's weight matrices in fewer bits, or with the smallest numbers set to zero.

Sources: magnitude pruning within each matrix, Learning both Weights and Connections for Efficient
Neural Networks (Han et al., NeurIPS 2015); int8 and int4 by rounding to the nearest, weights only,
as torchao's `Int8WeightOnlyConfig` and `Int4WeightOnlyConfig` choose scales and zero points. The
question whether prompts learned through one form work on another is that of Compress, Then Prompt
(Xu et al., ICML 2024), which prunes with SparseGPT and quantises with GPTQ; both need calibration
data, so we do neither.

torchao rounds; the four-bit numbers are packed here, because torchao's own packed forms need a
CUDA kernel or the package mslk. The same form is then used on all devices. Embeddings are not
pruned, and are kept in int8 where the rest is in int4, since they are looked up and not summed.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import L1Unstructured

from fedprompt.backbone.kept_modules import Kind, install, matrices
from fedprompt.backbone.matrices import FIELDS, GROUP, KeptMatrix
from fedprompt.config.schema import WeightFormat
from fedprompt.errors import UserError

HALF: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
QUANTISED = ("int8", "int4")
MARK = "::"
"""Between the name of a matrix and that of a part of its small form, in a state dict."""


@dataclass(frozen=True)
class Compression:
    """How weight matrices are kept.

    Attributes:
        weights: their format.
        pruned: the fraction of every matrix that is set to zero.
    """

    weights: WeightFormat = "float32"
    pruned: float = 0.0

    def __bool__(self) -> bool:
        """Whether anything is changed."""
        return (self.weights, self.pruned) != ("float32", 0)

    def __str__(self) -> str:
        return f"{self.weights}, {100 * self.pruned:g} % pruned" if self.pruned else self.weights

    def check(self) -> None:
        """Check that the library is installed.

        Raises:
            UserError: it is not.
        """
        if self.weights in QUANTISED and importlib.util.find_spec("torchao") is None:
            raise UserError(
                f"backbone: weights={self.weights} needs the package torchao: "
                "pip install 'fedprompt[quant]'."
            )


AS_TRAINED = Compression()


def compress(
    model: nn.Module, state: Mapping[str, Tensor], compression: Compression
) -> dict[str, Tensor]:
    """A model's tensors with its matrices in a small form.

    Args:
        model: the architecture; its values are not read.
        state: its tensors, float32.
        compression: the form.

    Returns:
        A state dict for `adopt`, in which the parts of a matrix follow its name and `MARK`.

    Raises:
        UserError: torchao is needed and not installed.
    """
    compression.check()
    kinds = dict(matrices(model))
    small: dict[str, Tensor] = {}
    for name, tensor in state.items():
        kept = _small(tensor, kinds[name], compression) if name in kinds else tensor
        if isinstance(kept, Tensor):
            small[name] = kept
        else:
            small |= {f"{name}{MARK}{part}": t for part, t in kept.tensors.items()}
    return small


def install_kept(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put the matrices of a state dict from `compress` into a model.

    Args:
        model: the architecture; changed in place.
        state: a state dict, from `compress` or of whole tensors.

    Returns:
        The other tensors, which the model's `load_state_dict` takes.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    others = {}
    for key, tensor in state.items():
        name, mark, part = key.partition(MARK)
        if mark:
            parts.setdefault(name, {})[part] = tensor
        else:
            others[key] = tensor
    install(model, {name: KeptMatrix.of(tensors) for name, tensors in parts.items()})
    return others


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights of a model, kept ones as they are kept."""
    kept = (t for name, t in model.named_buffers() if name.rpartition(".")[2] in FIELDS)
    return sum(t.nbytes for t in (*model.parameters(), *kept))


def _small(weight_oi: Tensor, kind: Kind, compression: Compression) -> Tensor | KeptMatrix:
    if compression.pruned and kind == "product":
        weight_oi = L1Unstructured(compression.pruned).prune(weight_oi)
    if compression.weights == "float32":
        return weight_oi
    if compression.weights in HALF:
        return KeptMatrix(weight_oi.to(HALF[compression.weights]))
    if compression.weights == "int8" or kind == "rows" or weight_oi.shape[1] % 2:
        return _int8(weight_oi)
    return _int4(weight_oi)


def _int8(weight_oi: Tensor) -> KeptMatrix:
    ao = _torchao()
    block, limits = (1, weight_oi.shape[1]), (torch.int8, -127, 127)
    kind = ao.MappingType.SYMMETRIC
    scale_o, zero_o = ao.choose_qparams_affine(weight_oi, kind, block, *limits)
    data_oi = ao.quantize_affine(weight_oi, block, scale_o, zero_o, *limits)
    return KeptMatrix(data_oi, scale_o.float().view(-1, 1))


def _int4(weight_oi: Tensor) -> KeptMatrix:
    ao = _torchao()
    rows, columns = weight_oi.shape
    group = columns if columns % GROUP else GROUP
    block, limits = (1, group), (torch.uint8, 0, 15)
    kind = ao.MappingType.ASYMMETRIC
    scale, zero = ao.choose_qparams_affine(weight_oi, kind, block, *limits)
    data_oi = ao.quantize_affine(weight_oi, block, scale, zero, *limits)
    low, high = data_oi.chunk(2, dim=1)
    grouped = (rows, columns // group, 1)
    zero = zero.view(grouped).to(torch.int8)
    return KeptMatrix(low | high << 4, scale.float().view(grouped), zero)


@cache
def _torchao() -> ModuleType:
    """torchao's primitives. Imported when they are needed, because that takes seconds."""
    # With PyTorch 2.14 it logs a warning about its own enumerations.
    logger = logging.getLogger("torch.utils._pytree")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return importlib.import_module("torchao.quantization.quant_primitives")
    finally:
        logger.setLevel(level)
