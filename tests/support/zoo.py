"""Every architecture of open_clip's list with few and narrow layers, and words for it."""

from __future__ import annotations

import copy
from typing import Any

import open_clip
import pytest
import torch
from open_clip.coca_model import CoCa
from torch import Tensor

from fedprompt.backbone.architecture import empty_model
from fedprompt.backbone.clip import FrozenCLIP
from tests.support.hub_models import CONFIGS
from tests.support.small_timm import shrink_timm, sizes

WIDTH, VOCABULARY = 48, 200
KINDS = {"roberta": "roberta", "xlm": "xlm-roberta", "mt5": "mt5", "nllb": "m2m_100"}
"""Part of a name of a text tower on the hub, and its kind; the most specific last."""


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let timm and transformers build small towers until the test ends."""
    shrink_timm(monkeypatch)
    monkeypatch.setattr(
        "open_clip.hf_model.AutoConfig.from_pretrained",
        lambda name: CONFIGS[text_kind(name)],
    )


def text_kind(name: str) -> str:
    """The kind of a text tower on the hub."""
    return next(kind for part, kind in reversed(KINDS.items()) if part in name)


def small_settings(name: str) -> dict[str, Any]:
    """open_clip's settings of an architecture, with smaller numbers and the same structure."""
    cfg: dict[str, Any] = copy.deepcopy(open_clip.get_model_config(name))
    vision, text = cfg["vision_cfg"], cfg["text_cfg"]
    cfg["embed_dim"] = WIDTH
    if "timm_model_name" in vision:
        options = sizes(vision["timm_model_name"])
        vision["image_size"] = options.get("img_size", 224 if "depths" in options else 64)
    elif isinstance(vision.get("layers"), list):
        vision |= {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}
    else:
        vision |= {"layers": 2, "width": WIDTH, "head_width": 24, "image_size": 32, "patch_size": 8}
        if "attn_pooler_heads" in vision:
            vision["attn_pooler_heads"] = 2
    small = {"layers": 2, "width": WIDTH, "heads": 4, "vocab_size": VOCABULARY}
    if "hf_model_name" not in text:
        text |= small
    if "multimodal_cfg" in cfg:
        cfg["multimodal_cfg"] |= small | {"layers": 1}
    return cfg


class Words:
    """A tokenizer in the style of an architecture's own: words by the order of their appearance."""

    def __init__(self, cfg: dict[str, Any]) -> None:
        text = cfg["text_cfg"]
        self.length = text.get("context_length", 77)
        self.before, self.after, self.pad = [198], [199], 0  # CLIP: the end has the largest id
        if "hf_model_name" in text:
            kind = text_kind(text["hf_model_name"])
            ids = {"mt5": ([], [1], 0), "m2m_100": ([4], [2], 1)}
            self.before, self.after, self.pad = ids.get(kind, ([0], [2], 1))
        elif text.get("pool_type") == "eos":
            self.before, self.after, self.pad = [0], [text["eos_id"]], 1
        elif text.get("tokenizer_kwargs", {}).get("strip_sep_token"):
            self.before, self.after, self.pad = [2], [], 0
        elif text.get("pool_type") == "last":
            self.before, self.after, self.pad = [], [1], 1
        self.known: dict[str, int] = {}

    def __call__(self, texts: list[str], context_length: int | None = None) -> Tensor:
        length, rows = context_length or self.length, []
        for text in texts:
            words = text.replace(".", " .").split()
            ids = [self.known.setdefault(word, 10 + len(self.known)) for word in words]
            row = (self.before + ids)[: length - len(self.after)] + self.after
            rows.append(row + [self.pad] * (length - len(row)))
        return torch.tensor(rows)


def small_clip(name: str) -> FrozenCLIP:
    """The architecture with few and narrow layers and random weights."""
    cfg = small_settings(name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = empty_model(cfg, meta=False)
    assert isinstance(model, CoCa) == ("multimodal_cfg" in cfg)
    return FrozenCLIP(model, Words(cfg), name=name, weights_hash="seed 0")
