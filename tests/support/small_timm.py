"""timm's towers with few and narrow layers, under the names that open_clip uses."""

from __future__ import annotations

from typing import Any

import pytest
import timm

TRANSFORMER = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 32, "patch_size": 8}


def sizes(name: str) -> dict[str, Any]:
    """What `timm.create_model` is told besides the name, so that the tower is small."""
    if name.startswith("vitamin"):
        return {"depth": 2, "img_size": 64}
    if name.startswith("vit_base_mci"):
        return {"depth": 2, "img_size": 64}
    if name.startswith("vit"):
        return TRANSFORMER
    if name.startswith("eva"):
        return {**TRANSFORMER, "mlp_ratio": 2}
    if name.startswith("convnext"):
        return {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
    if name.startswith("swin"):
        return {"depths": (1, 1, 1, 1), "embed_dim": 8, "num_heads": (1, 1, 2, 2)}
    if name.startswith("fastvit"):
        stages = 5 if name.endswith(("mci3", "mci4")) else 4
        return {"layers": (1,) * stages, "embed_dims": (8, 16, 32, 64, 128)[:stages]}
    return {}


def shrink_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let timm build small towers until the test ends."""
    build = timm.create_model

    def create(name: str, **options: Any) -> Any:
        return build(name, **{**options, **sizes(name)})

    monkeypatch.setattr(timm, "create_model", create)
