"""What a checkpoint that does not fit a model holds instead, in a few words.

PyTorch's message lists every tensor that is missing or has another shape. Most often the file
belongs to another model of the same kind, or holds one of the two towers alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import open_clip
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from torch import Tensor

SHOWN = 3
"""Models that a message names at most."""


def wrong_weights(name: str, model: Any, tensors: Mapping[str, Tensor]) -> str | None:
    """Say why tensors do not fit a model.

    Args:
        name: the model's name.
        model: the model.
        tensors: what the checkpoint holds.

    Returns:
        The reason and what to do, or None where it is not one of the known ones.
    """
    images = any(key.startswith("visual.") for key in tensors)
    texts = any(_is_text(key) for key in tensors)
    if images and not texts:
        return "it holds an image tower alone; name a file of the whole model."
    if texts and not images:
        return "it holds a text tower alone; name a file of the whole model."
    shape = _shape(tensors)
    if shape is None or shape == _shape(model.state_dict()):
        return None
    others = [m for m in open_clip.list_models() if m != name and _shape_of_name(m) == shape]
    # A variant differs in settings that no weight shows, so its short name comes first.
    likely = sorted(others, key=len)[:SHOWN]
    if not likely:
        return None
    return f"its tensors have the shapes of {' or '.join(likely)}; set backbone.model to it."


def _is_text(key: str) -> bool:
    return key.startswith(("text.", "transformer.", "token_embedding.", "ln_final."))


def _shape(tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
    """Sizes by which CLIPs with a ViT of open_clip differ; None for other models."""
    flat = {key.removeprefix("text."): tensor for key, tensor in tensors.items()}
    patch, projection = flat.get("visual.conv1.weight"), flat.get("visual.proj")
    embedding = flat.get("token_embedding.weight")
    if patch is None or projection is None or embedding is None or patch.ndim != 4:
        return None
    return (
        projection.shape[1],
        patch.shape[0],
        patch.shape[-1],
        _layers(flat, "visual.transformer.resblocks."),
        embedding.shape[1],
        embedding.shape[0],
        _layers(flat, "transformer.resblocks."),
    )


def _layers(tensors: Mapping[str, Tensor], prefix: str) -> int:
    return len({key[len(prefix) :].split(".")[0] for key in tensors if key.startswith(prefix)})


def _shape_of_name(name: str) -> tuple[int, ...] | None:
    cfg = open_clip.get_model_config(name)
    if "timm_model_name" in cfg["vision_cfg"] or "hf_model_name" in cfg["text_cfg"]:
        return None
    vision, text = CLIPVisionCfg(**cfg["vision_cfg"]), CLIPTextCfg(**cfg["text_cfg"])
    if "multimodal_cfg" in cfg or not isinstance(vision.layers, int):
        return None
    sizes = (vision.width, vision.patch_size, vision.layers)
    return (cfg["embed_dim"], *sizes, text.width, text.vocab_size, text.layers)
