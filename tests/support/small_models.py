"""Small architectures with seeded random weights, in every kind of file that users have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import CLIP, CustomTextCLIP
from safetensors.torch import save_file
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import load_clip
from fedprompt.config.schema import BackboneConfig
from fedprompt.errors import UserError
from tests.support.builders import RANDOM_CLIP

VISION: dict[str, Any] = dict(RANDOM_CLIP["vision_cfg"])  # type: ignore[call-overload]
TEXT: dict[str, Any] = {**RANDOM_CLIP["text_cfg"], "layers": 2}  # type: ignore[dict-item]
SMALL: dict[str, Any] = {"embed_dim": 32, "vision_cfg": VISION, "text_cfg": TEXT}
MODELS: dict[str, dict[str, Any]] = {
    "small-vit": SMALL,
    "small-vit-quick": {**SMALL, "quick_gelu": True},
    "small-vit-wide": {**SMALL, "embed_dim": 48},
    "small-vit-16": {**SMALL, "vision_cfg": {**VISION, "patch_size": 16}},
    "small-rn": {
        **SMALL,
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
    },
    "small-custom": {**SMALL, "custom_text": True},
    # As SigLIP's text tower: every position sees every other, and the last one is the feature.
    "small-last": {
        **SMALL,
        "custom_text": True,
        "init_logit_bias": -10,
        "text_cfg": {**TEXT, "no_causal_mask": True, "pool_type": "last", "proj_bias": True},
    },
    "small-hf": {**SMALL, "text_cfg": {"hf_model_name": "no/such-text-tower"}},
    "small-coca": {
        **SMALL,
        "custom_text": True,
        "vision_cfg": {**VISION, "output_tokens": True},
        "text_cfg": {**TEXT, "context_length": 76, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {"context_length": 76, "width": 64, "heads": 4, "layers": 1},
    },
    "small-tokenizer": {**SMALL, "text_cfg": {**TEXT, "hf_tokenizer_name": "no/such-tokenizer"}},
}
TEXTS = ["a photo of a river.", "beach"]

_built: dict[str, CLIP | CustomTextCLIP] = {}


def plain(name: str) -> CLIP | CustomTextCLIP:
    """open_clip's own model with seeded random weights, which loaded models must equal."""
    if name not in _built:
        with torch.random.fork_rng():
            torch.manual_seed(len(name))
            model = open_clip.create_model(name).eval()
            for parameter in model.parameters():
                # Rounded to float16, so that a half-precision file holds the same numbers.
                parameter.data = parameter.data.half().float()
        _built[name] = model
    return _built[name]


def weights(name: str) -> dict[str, Tensor]:
    """A copy of its weights."""
    return {k: v.clone() for k, v in plain(name).state_dict().items()}


def as_safetensors(path: Path, state: Mapping[str, Tensor]) -> Path:
    path = path.with_suffix(".safetensors")
    save_file(dict(state), path)
    return path


def as_pickle(path: Path, content: Any) -> Path:
    path = path.with_suffix(".pt")
    torch.save(content, path)
    return path


def half(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.half() if v.is_floating_point() else v for k, v in state.items()}


def load(name: str, checkpoint: Path | str, cache: Path, **options: Any) -> FrozenCLIP:
    config = BackboneConfig(model=name, checkpoint=str(checkpoint), device="cpu", **options)
    return load_clip(config, cache)


def copies(cache: Path) -> list[Path]:
    return sorted(cache.glob("weights/*.safetensors"))


def images(count: int = 3) -> Tensor:
    draw = np.random.default_rng(0)
    return torch.from_numpy(draw.standard_normal((count, 3, 32, 32), dtype=np.float32))


def assert_same_outputs(clip: FrozenCLIP, model: CLIP | CustomTextCLIP) -> None:
    tokens = open_clip.get_tokenizer(clip.name)(TEXTS)
    with torch.no_grad():
        # CoCa's models normalise unless told otherwise.
        image_BD = model.encode_image(images(), normalize=False)
        text_BD = model.encode_text(tokens, normalize=False)
    torch.testing.assert_close(clip.encode_images(images()), image_BD, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(clip.encode_text_raw(TEXTS), text_BD, rtol=1e-5, atol=1e-5)
    assert clip.logit_scale == pytest.approx(float(model.logit_scale.detach().exp()))
    assert clip.embed_dim == image_BD.shape[-1]


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    line = str(caught.value)
    assert line.startswith("backbone: ")
    assert "\n" not in line
    assert "Traceback" not in line
    return line
