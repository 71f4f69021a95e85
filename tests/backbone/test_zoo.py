"""open_clip's whole list with few and narrow layers: what its architectures can do, and do."""

from __future__ import annotations

import open_clip
import pytest
import torch
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.image_pass import image_pass
from fedprompt.backbone.patch_features import dense_encoder
from fedprompt.backbone.text_tokens import context_init
from fedprompt.backbone.text_tower import TextTower
from fedprompt.backbone.vision_tower import VisionTower
from fedprompt.backbone.zoo import Support, support_of
from fedprompt.errors import UserError
from tests.support.builders import CLASS_NAMES
from tests.support.comparison import relative
from tests.support.zoo import shrink, small_clip, small_settings, text_kind

RTOL = 1e-4
# One of each kind of text tower and of each kind of image tower, the smallest of its kind.
KINDS = (
    "ViT-B-32", "RN50", "ViT-M-16-alt", "ViT-H-14-CLIPA", "ViT-L-14-worldwide", "coca_base",
    "coca_ViT-B-32", "coca_roberta-ViT-B-32", "roberta-ViT-B-32", "xlm-roberta-base-ViT-B-32",
    "mt5-base-ViT-B-32", "nllb-clip-base-siglip", "ViT-B-16-SigLIP", "ViT-B-16-SigLIP2",
    "EVA01-g-14", "EVA02-B-16", "PE-Core-B-16", "MobileCLIP-B", "MobileCLIP2-S0", "ViTamin-S",
    "convnext_tiny", "swin_base_patch4_window7_224", "vit_medium_patch16_gap_256",
    "vit_relpos_medium_patch16_cls_224", "convnext_large_d", "MobileCLIP2-L-14", "nllb-clip-base",
    "ViT-SO400M-16-SigLIP-i18n-256",
)  # fmt: skip
NUMBERS = {
    "image_size", "timm_drop_path", "timm_drop", "ls_init_value", "mlp_ratio", "vocab_size",
    "heads", "context_length", "eos_id", "hf_tokenizer_name", "tokenizer_kwargs",
}  # fmt: skip
"""Settings of a tower that change no step of a pass."""


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def found(clip: FrozenCLIP) -> Support:
    """What a model that has been built can do."""
    own, text = image_pass(clip.model.visual), clip.text
    visual = "no" if own is None else "fast" if VisionTower(clip).fast else "plain"
    return Support(
        text="fast" if text.fast else "plain",
        visual=visual,  # type: ignore[arg-type]
        patches=dense_encoder(clip) is not None,
        adapters=text.adaptable and own is not None and own.adaptable,
        library="open_clip" if text.adaptable else "transformers",
    )


def check_text(clip: FrozenCLIP) -> None:
    context = context_init(clip, "seen from above here", 4, torch.empty(0))
    tower = TextTower(clip, CLASS_NAMES, 4)
    expected = clip.encode_text_raw([f"seen from above here {name}." for name in CLASS_NAMES])
    assert relative(tower(context), expected) < RTOL
    leaves = [context.requires_grad_(), draw(1, *context.shape).requires_grad_()]
    for gradient in torch.autograd.grad(tower(*leaves).square().sum(), leaves):
        assert gradient.abs().max() > 0


def check_images(clip: FrozenCLIP) -> None:
    size = clip.model.visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    pixels = draw(1, 2, 3, height, width)
    features = clip.encode_images(pixels[0])
    assert features.isfinite().all()
    patches = dense_encoder(clip)
    if patches is not None:
        assert patches[0](pixels[0]).shape == (2, patches[1], clip.embed_dim)
    if image_pass(clip.model.visual) is None:
        with pytest.raises(UserError, match="visual prompts"):
            VisionTower(clip)
        return
    tower = VisionTower(clip)
    assert relative(tower(pixels)[0], features) < RTOL
    leaves = [draw(1, 3, tower.width), draw(1, 1, 3, tower.width, seed=1)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    out = tower(pixels, *leaves)
    assert out.shape == (1, 2, features.shape[-1])
    for gradient in torch.autograd.grad((out * draw(*out.shape)).sum(), leaves):
        assert gradient.abs().max() > 0


@pytest.mark.parametrize("name", [name for name in KINDS if name in open_clip.list_models()])
def test_one_of_each_kind(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    clip = small_clip(name)
    assert found(clip) == support_of(open_clip.get_model_config(name))
    check_text(clip)
    check_images(clip)


def structure(name: str) -> str:
    """What of an architecture's settings decides which code it takes: all but its numbers."""
    cfg = small_settings(name)
    vision, text = cfg["vision_cfg"], cfg["text_cfg"]
    timm_name = vision.pop("timm_model_name", "")
    family = "pe" if "pe_core" in timm_name else timm_name.partition("_")[0]
    if "hf_model_name" in text:
        text["hf_model_name"] = text_kind(text["hf_model_name"])
    parts = [
        sorted((key, value) for key, value in section.items() if key not in NUMBERS)
        for section in (vision, text)
    ]
    return str((family, *parts, "multimodal_cfg" in cfg))


def test_no_kind_of_architecture_is_left_out() -> None:
    """What open_clip lists and is unlike all of `KINDS` has to be added to them."""
    listed = open_clip.list_models()
    known = {structure(name) for name in KINDS if name in listed}
    assert [name for name in listed if structure(name) not in known] == []


@pytest.mark.slow
def test_the_whole_list(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    for name in open_clip.list_models():
        if name.startswith("ViTamin") and name != "ViTamin-S":
            continue  # timm builds them at their full width only; ViTamin-S takes the same code
        clip = small_clip(name)
        assert found(clip) == support_of(open_clip.get_model_config(name)), name
        check_text(clip)
        check_images(clip)
