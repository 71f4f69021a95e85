"""open_clip's architectures: their settings, models without weights, and weights put into them."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import open_clip
import torch
from open_clip.model import CLIP, CustomTextCLIP
from torch import Tensor

from fedprompt.backbone.text_parts import no_prompts
from fedprompt.config.schema import BackboneConfig
from fedprompt.errors import UserError, did_you_mean


def model_settings(config: BackboneConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """open_clip's settings of the model and of the pretrained tag.

    Args:
        config: the config's `backbone` section; `model` must not be `tiny`.

    Returns:
        The model's settings, as in open_clip's JSON files, and the tag's: where its weights are,
        and how images are preprocessed for them. The latter is empty where no tag is given.

    Raises:
        UserError: the model or the tag is unknown, or learned prompts cannot pass through the
            model's text tower. The last is checked here, before weights are downloaded.
    """
    known = open_clip.list_models()
    if config.model not in known:
        hint = _nearest(config.model, ["tiny", *known])
        raise UserError(f"backbone: open_clip has no model {config.model!r}.{hint}")
    model_cfg: dict[str, Any] = open_clip.get_model_config(config.model)
    text_cfg = model_cfg["text_cfg"]
    if "hf_model_name" in text_cfg or text_cfg.get("embed_cls") or "multimodal_cfg" in model_cfg:
        raise no_prompts(config.model)
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


def _nearest(name: str, known: Sequence[str]) -> str:
    close = get_close_matches(name, known, n=3, cutoff=0.5)
    return f" Nearest: {', '.join(close)}." if close else " See open_clip.list_models()."


def empty_model(model_cfg: Mapping[str, Any], *, meta: bool) -> CLIP | CustomTextCLIP:
    """Build the architecture without trained weights.

    Args:
        model_cfg: from `model_settings`.
        meta: build it on the meta device, where tensors have shapes and no memory. This is ignored
            for timm's towers: they compute buffers that no checkpoint holds.
    """
    cfg = copy.deepcopy(dict(model_cfg))
    if "timm_model_name" in cfg["vision_cfg"]:
        cfg["vision_cfg"]["timm_model_pretrained"], meta = False, False
    model_class = CustomTextCLIP if cfg.pop("custom_text", False) else CLIP
    # Initial weights are drawn from PyTorch's global generator. Its state is restored, and the lock
    # keeps another thread from drawing in between.
    with _GLOBAL_RNG, torch.random.fork_rng(devices=[]), torch.device("meta" if meta else "cpu"):
        return model_class(**cfg)


_GLOBAL_RNG = threading.Lock()


def adopt_weights(model: CLIP | CustomTextCLIP, state: Mapping[str, Tensor]) -> None:
    """Put the tensors of `state` into the model without copying them.

    Memory-mapped tensors stay mapped. The causal mask, which no checkpoint holds, is rebuilt.

    Raises:
        RuntimeError: `state` lacks tensors, has others, or has them in other shapes.
    """
    # assign: a model on the meta device has no memory to copy into, and a copy would not be mapped.
    model.load_state_dict(dict(state), strict=True, assign=True)
    text = getattr(model, "text", model)
    if getattr(text, "attn_mask", None) is not None and text.attn_mask.is_meta:
        size = text.positional_embedding.shape[0]
        text.attn_mask = torch.full((size, size), float("-inf")).triu_(1)
    tensors = (*model.named_parameters(), *model.named_buffers())
    missing = [name for name, tensor in tensors if tensor.is_meta]
    if missing:
        raise RuntimeError(f"tensors without values after loading: {missing}")
