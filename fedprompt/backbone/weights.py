"""Weights of a model: located or downloaded, converted once, and mapped into memory.

Every process does this once before the first round. Mapped means that pages of the file serve as
the tensors' memory. All processes of a machine that map the same file share one copy, and no
process reads what it does not use.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import open_clip
from filelock import FileLock
from open_clip.pretrained import download_pretrained
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedprompt.backbone.architecture import Model, empty_model
from fedprompt.backbone.checkpoint_files import files_of, read_tensors
from fedprompt.backbone.compression import Compression, compress
from fedprompt.backbone.fingerprint import digest
from fedprompt.backbone.model_folder import ModelFolder
from fedprompt.backbone.wrong_weights import wrong_weights
from fedprompt.config.schema import BackboneConfig
from fedprompt.errors import UserError
from fedprompt.files import replacing, stand_in
from fedprompt.hub import stay_offline_if_unreachable

COMPRESSED = 1
"""Version of the small forms; increase it when `compress` changes a bit of its result."""


def find_weights(
    config: BackboneConfig, tag_cfg: dict[str, Any], folder: ModelFolder | None = None
) -> Path:
    """Locate the weights.

    They are the file `config.checkpoint` if it is given, or else those of the model's folder, or a
    download of the pretrained tag.

    Args:
        config: the config's `backbone` section.
        tag_cfg: the tag's settings from `architecture.model_settings`.
        folder: the folder that `config.model` names, if it names one.

    Returns:
        A checkpoint file, or the index of several.

    Raises:
        UserError: there is no such file, it holds something else, or the download fails.
    """
    if config.checkpoint:
        source = Path(config.checkpoint).expanduser()
        if not source.is_file():
            raise UserError(f"backbone: no checkpoint file {source}.")
        return _checked(source)
    if folder is not None:
        return _checked(folder.weights())
    stay_offline_if_unreachable()
    try:
        source = Path(download_pretrained(tag_cfg))
    except Exception as error:  # the hub's and urllib's errors have no common parent
        raise UserError(
            f"backbone: weights '{config.pretrained}' of {config.model} could not be downloaded "
            f"({type(error).__name__}); fetch them on a machine with a connection and add "
            "backbone.checkpoint=FILE, or copy its Hugging Face cache."
        ) from None
    return _checked(source)


def _checked(source: Path) -> Path:
    """Refuse files that hold no weights, such as the pointer that Git LFS leaves."""
    for file in files_of(source):
        try:
            with file.open("rb") as stream:
                instead = stand_in(stream.read(512))
        except OSError as error:
            raise UserError(f"backbone: cannot read {file}: {error.strerror}.") from None
        if instead is not None:
            raise UserError(f"backbone: {file} holds no weights: {instead}.")
    return source


def mappable_weights(
    name: str, model_cfg: Mapping[str, Any], source: Path, key: str, cache_dir: Path
) -> Path:
    """Return a float32 safetensors file with the model's own tensor names.

    This is `source` itself if it is such a file. Everything else (half precision, pickles,
    checkpoints of a training run) is converted once and stored below `cache_dir`.

    Args:
        name: the model's name, part of the copy's file name.
        model_cfg: the model's settings.
        source: a file of `find_weights`.
        key: differs whenever `source` or `model_cfg` does.
        cache_dir: the cache's folder.

    Raises:
        UserError: `source` is damaged or holds other weights, or the copy cannot be written.
    """
    shapes = {k: tuple(v.shape) for k, v in empty_model(model_cfg, meta=True).state_dict().items()}
    if source.suffix == ".safetensors" and _is_mappable(source, shapes):
        return source
    target = cache_dir / "weights" / f"{name.replace('/', '-')}-{key[:16]}.safetensors"
    _once(target, lambda: _convert(name, model_cfg, source, target))
    return target


def kept_weights(
    model: Model,
    state: Mapping[str, Tensor],
    compression: Compression,
    name: str,
    key: str,
    cache_dir: Path,
) -> Path:
    """Return a safetensors file with the matrices of a model in a small form, for `map_weights`.

    It is made once, so that the processes of a machine share one copy of it in memory.

    Args:
        model: the architecture.
        state: its tensors, float32.
        compression: the form.
        name: the model's name, part of the file's name.
        key: differs whenever `state` does.
        cache_dir: the cache's folder.

    Raises:
        UserError: a library is missing, or the file cannot be written.
    """
    kind = digest(f"{COMPRESSED} {compression!r}")
    stem = f"{name.replace('/', '-')}-{key[:16]}-{compression.weights}-{kind[:8]}"
    target = cache_dir / "weights" / f"{stem}.safetensors"

    def write() -> None:
        with replacing(target) as temporary:
            # safetensors refuses views, and tensors that share memory.
            small = compress(model, state, compression)
            save_file({k: t.contiguous().clone() for k, t in small.items()}, temporary)

    _once(target, write)
    return target


def _once(target: Path, write: Callable[[], None]) -> None:
    """Write a file of the cache unless it is there.

    Raises:
        UserError: it cannot be written.
    """
    # No lock for a copy that exists, so that a cache may be on a read-only file system.
    if target.is_file():
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Processes that start together wait for the first one instead of converting again.
        with FileLock(f"{target}.lock"):
            if not target.is_file():
                write()
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"backbone: cannot write {target}: {error}; set output.cache to a folder with room."
        ) from None


def map_weights(file: Path) -> dict[str, Tensor]:
    """Map the tensors of a file from `mappable_weights` into memory.

    Raises:
        UserError: the file is damaged.
    """
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"backbone: {file} is damaged ({_reason(error)}); remove it.") from None
    return tensors


def _convert(name: str, model_cfg: Mapping[str, Any], source: Path, target: Path) -> None:
    """Read `source` into the model, and keep the result as float32 safetensors."""
    model = empty_model(model_cfg, meta=False)
    tensors: dict[str, Tensor] = {}
    try:
        if source.suffix in (".npz", ".npy"):  # SigLIP as Google publishes it
            open_clip.load_checkpoint(model, str(source))
        else:
            tensors = read_tensors(source)
            _load(model, tensors, target.parent)
    except Exception as error:  # unpickling, key and shape errors come in many types
        reason = wrong_weights(name, model, tensors) or _why_not(error)
        raise UserError(f"backbone: {source} does not hold weights of {name}: {reason}") from None
    state = {
        k: (v.float() if v.is_floating_point() else v).contiguous().clone()
        for k, v in model.state_dict().items()
    }
    with replacing(target) as temporary:
        save_file(state, temporary)


def _load(model: Model, tensors: Mapping[str, Tensor], scratch: Path) -> None:
    """Put tensors into the model, in its own layout or in one that open_clip converts."""
    own = model.state_dict()
    if {k: v.shape for k, v in tensors.items()} == {k: v.shape for k, v in own.items()}:
        model.load_state_dict(tensors, strict=True)
        return
    # open_clip converts what it reads from a file, and reads fewer kinds of files than we do.
    with tempfile.NamedTemporaryFile(dir=scratch, suffix=".safetensors") as file:
        save_file({k: v.contiguous().clone() for k, v in tensors.items()}, file.name)
        open_clip.load_checkpoint(model, file.name, strict=True)


def _is_mappable(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a safetensors file has exactly these tensors, in the dtypes that the model uses."""
    try:
        with safe_open(path, framework="pt") as reader:
            keys = set(reader.keys())
            if keys != set(shapes):
                return False
            slices = {k: reader.get_slice(k) for k in keys}
            return all(
                tuple(s.get_shape()) == shapes[k] and s.get_dtype() in ("F32", "I64")
                for k, s in slices.items()
            )
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"backbone: {path} is not a readable safetensors file: {_reason(error)}"
        ) from None


def _why_not(error: Exception) -> str:
    """Why a checkpoint cannot be loaded, without PyTorch's advice to load it unsafely."""
    text = str(error)
    # By name, since the class is in `pickle`, which no module of ours imports.
    if type(error).__name__ == "UnpicklingError" or "weights_only" in text:
        found = re.search(r"GLOBAL (\S+)", text)
        if found is None:
            return "it is damaged, or no checkpoint of PyTorch."
        return (
            f"it is a pickle of Python objects ({found[1]}), which could run code when it is "
            "opened; save the tensors of its state_dict as .safetensors where you trust it."
        )
    return _reason(error)


def _reason(error: Exception) -> str:
    """The start of a library's message on one line; some print every tensor name."""
    return " ".join(str(error).split())[:200]
