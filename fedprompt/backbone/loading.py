"""CLIP weights: downloaded, from a file or embedded; converted once and memory-mapped."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from filelock import FileLock
from open_clip.model import CLIP, CustomTextCLIP
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedprompt.backbone.clip import _NO_PROMPTS, FrozenCLIP, _digest
from fedprompt.backbone.tiny import tiny_card, tiny_model_config, tiny_state_dict
from fedprompt.config.schema import BackboneConfig
from fedprompt.errors import UserError, did_you_mean
from fedprompt.files import replacing, write_bytes


def load_clip(config: BackboneConfig, cache_dir: Path) -> FrozenCLIP:
    """The backbone that `config` names, its weights memory-mapped where they come from a file.

    `cache_dir` keeps float32 safetensors copies of checkpoints that cannot be mapped as they are
    (half precision, pickles), so that all processes of a machine share one copy in memory.

    Raises:
        UserError: unknown model or tag, weights that cannot be had, read or fitted, no GPU.
    """
    device = _device(config.device)
    if config.model == "tiny":
        return _load_tiny(config, device)
    model_cfg, tag_cfg = _settings(config)
    tokenizer = _tokenizer(config.model)
    if config.checkpoint:
        source = Path(config.checkpoint).expanduser()
        if not source.is_file():
            raise UserError(f"backbone: no checkpoint file {source}.")
    else:
        source = _download(config, tag_cfg)
    source_hash = _file_hash(source, cache_dir)
    weights = _mappable_weights(config.model, model_cfg, source, source_hash, cache_dir)
    model = _build(config.model, model_cfg, weights)
    preprocess_cfg = open_clip.transform.merge_preprocess_dict(
        open_clip.transform.PreprocessCfg(), tag_cfg
    )
    preprocess_cfg["size"] = model.visual.image_size
    open_clip.model.set_model_preprocess_cfg(model, preprocess_cfg)
    return FrozenCLIP(
        model,
        tokenizer,
        name=config.model,
        weights_hash=_digest(source_hash + json.dumps(model_cfg, sort_keys=True)),
        device=device,
        precision=config.precision,
        image_batch=config.image_batch,
    )


def _settings(config: BackboneConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """open_clip's config of the model, and of the pretrained tag (empty without one)."""
    known = open_clip.list_models()
    if config.model not in known:
        hint = _nearest(config.model, ["tiny", *known])
        raise UserError(f"backbone: open_clip has no model {config.model!r}.{hint}")
    model_cfg: dict[str, Any] = open_clip.get_model_config(config.model)
    text_cfg = model_cfg["text_cfg"]
    if "hf_model_name" in text_cfg or text_cfg.get("embed_cls") or "multimodal_cfg" in model_cfg:
        raise UserError(_NO_PROMPTS.format(config.model))
    if config.pretrained is None:
        return model_cfg, {}
    tag_cfg: dict[str, Any] = dict(open_clip.get_pretrained_cfg(config.model, config.pretrained))
    if not tag_cfg:
        hint = did_you_mean(
            config.pretrained, open_clip.list_pretrained_tags_by_model(config.model)
        )
        raise UserError(
            f"backbone: model '{config.model}' has no pretrained tag {config.pretrained!r}.{hint}"
        )
    if tag_cfg.get("quick_gelu"):
        model_cfg["quick_gelu"] = True
    return model_cfg, tag_cfg


def _download(config: BackboneConfig, tag_cfg: dict[str, Any]) -> Path:
    from open_clip.pretrained import download_pretrained

    try:
        return Path(download_pretrained(tag_cfg))
    except Exception as error:  # the hub's and urllib's errors have no common parent
        raise UserError(
            f"backbone: weights '{config.pretrained}' of {config.model} could not be downloaded "
            f"({type(error).__name__}); fetch them on a machine with a connection and add "
            "backbone.checkpoint=FILE, or copy its Hugging Face cache."
        ) from None


def _tokenizer(model: str) -> Callable[..., Tensor]:
    text_cfg = open_clip.get_model_config(model)["text_cfg"]
    own = text_cfg.get("hf_tokenizer_name") or text_cfg.get("tokenizer_kwargs")
    if not own and "siglip" not in model.lower():
        # CLIP's own tokenizer: the one that open_clip holds already (24 MB), not a second one.
        length = text_cfg.get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH)
        return partial(open_clip.tokenize, context_length=length)
    try:
        tokenizer: Callable[..., Tensor] = open_clip.get_tokenizer(model)
    except Exception as error:  # transformers' and the hub's errors have no common parent
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"backbone: the tokenizer of {model} cannot be had: {reason}") from None
    return tokenizer


def _load_tiny(config: BackboneConfig, device: str) -> FrozenCLIP:
    model_cfg = tiny_model_config()
    with torch.device("meta"):
        model = CLIP(**model_cfg)
    _assign(model, tiny_state_dict())
    return FrozenCLIP(
        model,
        open_clip.tokenize,
        name="tiny",
        # `tiny_state_dict` has just held the file to this hash.
        weights_hash=tiny_card()["sha256"],
        device=device,
        precision=config.precision,
        image_batch=max(config.image_batch, 256),
    )


def _device(wanted: str) -> str:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("backbone: device 'cuda' asked for, but PyTorch sees no GPU; use 'auto'.")
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return wanted


def _nearest(name: str, known: Sequence[str]) -> str:
    from difflib import get_close_matches

    close = get_close_matches(name, known, n=3, cutoff=0.5)
    return f" Nearest: {', '.join(close)}." if close else " See open_clip.list_models()."


def _mappable_weights(
    name: str, model_cfg: dict[str, Any], source: Path, source_hash: str, cache_dir: Path
) -> Path:
    """A float32 safetensors file with the model's own keys: `source` itself where it is one."""
    meta = _empty_model(name, model_cfg, meta=True)
    expected = {k: tuple(v.shape) for k, v in meta.state_dict().items()}
    if source.suffix == ".safetensors" and _is_mappable(source, expected):
        return source
    key = _digest(source_hash + json.dumps(model_cfg, sort_keys=True))
    target = cache_dir / "weights" / f"{name.replace('/', '-')}-{key[:16]}.safetensors"
    if target.is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not target.is_file():
                _convert(name, model_cfg, source, target)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"backbone: cannot write {target}: {' '.join(str(error).split())}; set output.cache to "
            "a folder with room."
        ) from None
    return target


def _convert(name: str, model_cfg: dict[str, Any], source: Path, target: Path) -> None:
    """Let open_clip read and convert `source`, and keep the result as float32 safetensors."""
    model = _empty_model(name, model_cfg, meta=False)
    try:
        open_clip.load_checkpoint(model, str(source), strict=True, weights_only=True)
    except Exception as error:  # unpickling, key and shape errors come in many types
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"backbone: {source} does not hold weights of {name}: {reason}") from None
    state = {
        k: (v.float() if v.is_floating_point() else v).contiguous().clone()
        for k, v in model.state_dict().items()
    }
    with replacing(target) as temporary:
        save_file(state, temporary)


def _is_mappable(path: Path, expected: dict[str, tuple[int, ...]]) -> bool:
    try:
        with safe_open(path, framework="pt") as reader:
            keys = set(reader.keys())
            if keys != set(expected):
                return False
            slices = {k: reader.get_slice(k) for k in keys}
            return all(
                tuple(s.get_shape()) == expected[k] and s.get_dtype() in ("F32", "I64")
                for k, s in slices.items()
            )
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"backbone: {path} is not a readable safetensors file: {reason}") from None


def _build(name: str, model_cfg: dict[str, Any], weights: Path) -> CLIP | CustomTextCLIP:
    model = _empty_model(name, model_cfg, meta=True)
    try:
        _assign(model, load_file(weights))
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"backbone: {weights} is damaged ({reason}); remove it.") from None
    return model


def _assign(model: CLIP | CustomTextCLIP, state: dict[str, Tensor]) -> None:
    """Adopt the tensors of `state` without a copy, and rebuild what no checkpoint holds."""
    model.load_state_dict(state, strict=True, assign=True)
    text = getattr(model, "text", model)
    if getattr(text, "attn_mask", None) is not None and text.attn_mask.is_meta:
        size = text.positional_embedding.shape[0]
        text.attn_mask = torch.full((size, size), float("-inf")).triu_(1)
    left = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if left:
        raise RuntimeError(f"tensors without values after loading: {left}")


def _empty_model(name: str, model_cfg: dict[str, Any], *, meta: bool) -> CLIP | CustomTextCLIP:
    """The architecture without weights; on the meta device where open_clip's own classes allow.

    timm's towers make buffers that no checkpoint holds, so they are really built.
    """
    cfg = copy.deepcopy(model_cfg)
    if "timm_model_name" in cfg["vision_cfg"]:
        cfg["vision_cfg"]["timm_model_pretrained"], meta = False, False
    model_class = CustomTextCLIP if cfg.pop("custom_text", False) else CLIP
    with _GLOBAL_RNG, torch.random.fork_rng(devices=[]), torch.device("meta" if meta else "cpu"):
        return model_class(**cfg)


_GLOBAL_RNG = threading.Lock()


def _file_hash(path: Path, cache_dir: Path) -> str:
    """SHA-256 of a file's bytes; remembered by path, size and modification time."""
    status = path.stat()
    stamp = _digest(f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}")
    memo = cache_dir / "weights" / "hashes" / stamp
    with contextlib.suppress(OSError):
        return memo.read_text()
    try:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"backbone: cannot read {path}: {error.strerror}.") from None
    with contextlib.suppress(OSError):
        memo.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(memo, digest.encode())
    return digest


def shape_only_clip(name: str) -> FrozenCLIP:
    """A model of the sizes of `name`, its layers one and the same, random: for shapes alone."""
    cfg = open_clip.get_model_config(name)
    assert cfg is not None
    layers = cfg["vision_cfg"]["layers"], cfg["text_cfg"]["layers"]
    cfg["vision_cfg"] |= {"layers": 1, "image_size": 2 * cfg["vision_cfg"]["patch_size"]}
    cfg["text_cfg"] |= {"layers": 1}
    model = _empty_model(name, cfg, meta=False)
    for tower, count in zip((model.visual, getattr(model, "text", model)), layers, strict=True):
        tower.transformer.resblocks = nn.ModuleList([*tower.transformer.resblocks] * count)
    return FrozenCLIP(model, _tokenizer(name), name=name, weights_hash="random")
