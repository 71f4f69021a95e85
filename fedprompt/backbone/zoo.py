"""What each of open_clip's architectures can do here, read from its settings alone.

`docs/backbones.md` shows it as a table. `tests/backbone/test_zoo.py` builds the architectures with
few and narrow layers, computes with one of each kind, and compares what they can do with this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import open_clip
from open_clip.model import CLIPTextCfg, CLIPVisionCfg

TIMM_TRANSFORMERS = ("vision_transformer", "vision_transformer_hybrid", "eva", "vitamin")
"""timm's modules whose towers `image_pass` takes apart."""

Path = Literal["fast", "plain", "no"]
"""How prompts pass: through written-out layers of ours, through the tower's own blocks, or not."""


@dataclass(frozen=True, order=True)
class Support:
    """What an architecture can do.

    Attributes:
        text: text prompts, shallow and deep.
        visual: visual prompts, shallow and deep.
        patches: whether it gives features of patches.
        adapters: whether adapters can stand beside the blocks of both towers.
        library: where its text tower comes from.
    """

    text: Path
    visual: Path
    patches: bool
    adapters: bool
    library: Literal["open_clip", "transformers"]


def support_of(model_cfg: Mapping[str, Any]) -> Support:
    """What an architecture can do.

    Args:
        model_cfg: open_clip's settings of the model.
    """
    text, vision = CLIPTextCfg(**model_cfg["text_cfg"]), CLIPVisionCfg(**model_cfg["vision_cfg"])
    hugging_face = bool(text.hf_model_name)
    is_resnet = isinstance(vision.layers, (list, tuple))
    own_transformer = not vision.timm_model_name and not is_resnet
    plain = own_transformer and not (
        vision.attentional_pool
        or vision.final_ln_after_pool
        or vision.pool_type != "tok"
        or _special_blocks(vision)
    )
    visual: Path = "no"
    if plain:
        visual = "fast"
    elif own_transformer or (vision.timm_model_name and _is_transformer(vision.timm_model_name)):
        visual = "plain"
    return Support(
        text="fast" if not hugging_face and _is_fast(text) else "plain",
        visual=visual,
        patches=plain or is_resnet,
        adapters=own_transformer and not hugging_face,
        library="transformers" if hugging_face else "open_clip",
    )


def supports() -> dict[Support, list[str]]:
    """All architectures that open_clip lists, by what they can do; the fastest first."""
    found: dict[Support, list[str]] = {}
    for name in open_clip.list_models():
        found.setdefault(support_of(open_clip.get_model_config(name)), []).append(name)
    return dict(sorted(found.items()))


def _is_fast(text: CLIPTextCfg) -> bool:
    """Whether the tower is causal and reads its feature at the end of the text."""
    return (
        text.pool_type in ("argmax", "eos")
        and not text.no_causal_mask
        and not text.embed_cls
        and not _special_blocks(text)
    )


def _special_blocks(cfg: Any) -> bool:
    """Whether the settings of a tower ask for blocks with parts of their own."""
    kinds = ("block_type", "qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner")
    return any(getattr(cfg, kind, None) for kind in (*kinds, "scale_attn", "scale_fc"))


def _is_transformer(timm_name: str) -> bool:
    # timm's own list of what is in which module; without timm no such model can be opened.
    import timm

    return bool(timm.models.is_model_in_modules(timm_name.split(".")[0], TIMM_TRANSFORMERS))
