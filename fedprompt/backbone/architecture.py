"""open_clip's architectures: their settings, models without weights, and weights put into them."""

from __future__ import annotations

import copy
import importlib.util
import threading
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypeAlias

import open_clip
import open_clip.hf_model
import torch
from open_clip.coca_model import CoCa
from open_clip.hf_configs import arch_dict
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH
from torch import Tensor

from fedprompt.backbone.compression import install_kept
from fedprompt.backbone.model_folder import ModelFolder
from fedprompt.config.schema import BackboneConfig
from fedprompt.errors import UserError, did_you_mean

Model: TypeAlias = CLIP | CustomTextCLIP | CoCa


def model_settings(
    config: BackboneConfig, folder: ModelFolder | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """open_clip's settings of the model and of its weights.

    Args:
        config: the config's `backbone` section; `model` must not be `tiny`.
        folder: the folder that `model` names, if it names one.

    Returns:
        The model's settings, as in open_clip's JSON files, and those of the pretrained tag or of
        the folder: where the weights are, and how images are preprocessed for them. The latter is
        empty where neither is given.

    Raises:
        UserError: the model or the tag is unknown, or needs a package that is not installed.
    """
    if folder is not None:
        model_cfg, image_cfg = folder.settings()
        _check_packages(folder.name, model_cfg)
        return model_cfg, image_cfg
    known = open_clip.list_models()
    if config.model not in known:
        hint = _nearest(config.model, ["tiny", *known])
        raise UserError(f"backbone: open_clip has no model {config.model!r}.{hint}")
    model_cfg = open_clip.get_model_config(config.model)
    _check_packages(config.model, model_cfg)
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
        # Weights trained with QuickGELU give other features with the exact GELU.
        model_cfg["quick_gelu"] = True
    return model_cfg, tag_cfg


def _check_packages(name: str, model_cfg: Mapping[str, Any]) -> None:
    text_cfg = model_cfg["text_cfg"]
    hugging_face = text_cfg.get("hf_model_name") or text_cfg.get("hf_tokenizer_name")
    if hugging_face and importlib.util.find_spec("transformers") is None:
        raise UserError(
            f"backbone: {name} needs the package transformers for its texts: "
            "pip install 'fedprompt[hf]'."
        )


def with_text_model(
    model_cfg: dict[str, Any], name: str, folder: ModelFolder | None
) -> dict[str, Any]:
    """The model's settings with a text tower of Hugging Face that can be built.

    Args:
        model_cfg: from `model_settings`.
        name: the model's name, for messages.
        folder: the model's folder, in which the settings of its text tower may be.

    Raises:
        UserError: the settings of the text tower are neither in the folder nor in the hub's cache
            and cannot be downloaded, or open_clip does not know its kind.
    """
    text_name = model_cfg["text_cfg"].get("hf_model_name")
    if text_name is None:
        return model_cfg
    source = (folder.text_config() if folder else None) or text_name
    try:
        kind = open_clip.hf_model.AutoConfig.from_pretrained(source).model_type
    except Exception as error:  # the hub's and transformers' errors have no common parent
        where = folder.path if folder is not None and folder.hub_id is None else "the hub's cache"
        raise UserError(
            f"backbone: the settings of {name}'s text tower, {text_name}, could not be loaded "
            f"({type(error).__name__}); put its config.json into {where}."
        ) from None
    if kind not in arch_dict:
        raise UserError(
            f"backbone: the text tower of {name}, {text_name}, is of a kind that open_clip does "
            f"not build ({kind}); it knows {', '.join(sorted(arch_dict))}."
        )
    text_cfg = {**model_cfg["text_cfg"], "hf_model_name": source}
    return {**model_cfg, "text_cfg": text_cfg}


def _nearest(name: str, known: Sequence[str]) -> str:
    close = get_close_matches(name, known, n=3, cutoff=0.5)
    return f" Nearest: {', '.join(close)}." if close else " See open_clip.list_models()."


def empty_model(model_cfg: Mapping[str, Any], *, meta: bool) -> Model:
    """Build the architecture without trained weights.

    Args:
        model_cfg: from `model_settings`.
        meta: build it on the meta device, where tensors have shapes and no memory. This is ignored
            for towers of timm and of Hugging Face: they compute buffers that no checkpoint holds.
    """
    cfg = copy.deepcopy(dict(model_cfg))
    text_cfg = cfg["text_cfg"]
    hugging_face = bool(text_cfg.get("hf_model_name"))
    if "timm_model_name" in cfg["vision_cfg"]:
        cfg["vision_cfg"]["timm_model_pretrained"], meta = False, False
    if hugging_face:
        text_cfg["hf_model_pretrained"], meta = False, False
    model_class = CustomTextCLIP if cfg.pop("custom_text", False) or hugging_face else CLIP
    if "multimodal_cfg" in cfg:
        model_class = CoCa
    # Initial weights are drawn from PyTorch's global generator. Its state is restored, and the lock
    # keeps another thread from drawing in between.
    with _GLOBAL_RNG, torch.random.fork_rng(devices=[]), torch.device("meta" if meta else "cpu"):
        model = model_class(**cfg)
    if hugging_face:
        # open_clip writes the limit of the text tower here, and cuts texts at that of the CLIP.
        model.text.context_length = text_cfg.get("context_length", DEFAULT_CONTEXT_LENGTH)
    return model


_GLOBAL_RNG = threading.Lock()


def adopt_weights(model: Model, state: Mapping[str, Tensor]) -> None:
    """Put the tensors of `state` into the model without copying them.

    Memory-mapped tensors stay mapped. Causal masks, which no checkpoint holds, are rebuilt.

    Args:
        model: the architecture.
        state: its tensors, or what `compression.compress` made of them.

    Raises:
        RuntimeError: `state` lacks tensors, has others, or has them in other shapes.
    """
    # assign: a model on the meta device has no memory to copy into, and a copy would not be mapped.
    model.load_state_dict(install_kept(model, state), strict=True, assign=True)
    texts: tuple[Any, ...] = (getattr(model, "text", model), getattr(model, "text_decoder", None))
    for text in texts:
        mask = getattr(text, "attn_mask", None)
        if mask is not None and mask.is_meta:
            text.attn_mask = torch.full(mask.shape, float("-inf")).triu_(1)
    tensors = (*model.named_parameters(), *model.named_buffers())
    missing = [name for name, tensor in tensors if tensor.is_meta]
    if missing:
        raise RuntimeError(f"tensors without values after loading: {missing}")
