"""The frozen CLIP: equal to open_clip, and fingerprints that tell its features apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import load_clip
from fedprompt.config.schema import BackboneConfig
from tests.support.small_models import (
    TEXTS,
    _built,
    as_pickle,
    as_safetensors,
    assert_same_outputs,
    images,
    load,
    plain,
    weights,
)

pytestmark = pytest.mark.usefixtures("small_models")


def test_the_model_is_frozen(clip: FrozenCLIP) -> None:
    assert not any(m.training for m in clip.model.modules())
    assert not any(p.requires_grad for p in clip.model.parameters())
    features_BD = clip.encode_images(images())
    assert features_BD.shape == (3, clip.embed_dim)
    assert features_BD.dtype == torch.float32
    assert not features_BD.requires_grad
    assert not clip.encode_text_raw(TEXTS).requires_grad


def test_the_classifier_is_the_normalised_mean_over_templates(clip: FrozenCLIP) -> None:
    classes_CD = clip.zero_shot_classifier(["river", "beach"], ["a {}.", "the {} from above"])
    beach = clip.encode_text_raw(["a beach.", "the beach from above"])
    mean = (beach / beach.norm(dim=-1, keepdim=True)).mean(0)
    torch.testing.assert_close(classes_CD[1], mean / mean.norm())
    torch.testing.assert_close(classes_CD.norm(dim=-1), torch.ones(2))


@pytest.mark.parametrize("size", [(32, 32), (80, 50), (20, 31)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_preprocess_is_open_clips_own(tmp_path: Path, size: tuple[int, int], mode: str) -> None:
    clip = load("small-vit", as_pickle(tmp_path / "w", weights("small-vit")), tmp_path)
    _, _, transform = open_clip.create_model_and_transforms("small-vit")
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    assert torch.equal(clip.preprocess(image), transform(image))


def test_a_tags_settings_apply_to_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tag = {
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.2, 0.2),
        "interpolation": "bilinear",
        "resize_mode": "squash",
        "quick_gelu": True,
    }
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda *_: dict(tag))
    path = as_pickle(tmp_path / "w", weights("small-vit"))
    clip = load("small-vit", path, tmp_path, pretrained="mine")
    plain_clip = load("small-vit", path, tmp_path)
    preprocess = open_clip.transform.PreprocessCfg(
        size=32, **{k: v for k, v in tag.items() if k != "quick_gelu"}
    )
    transform = open_clip.transform.image_transform_v2(preprocess, is_train=False)
    image = Image.effect_mandelbrot((60, 40), (-3, -2.5, 2, 2.5), 50).convert("RGB")
    assert torch.equal(clip.preprocess(image), transform(image))
    assert clip.preprocess_fingerprint != plain_clip.preprocess_fingerprint
    assert clip.fingerprint != plain_clip.fingerprint, "the activation changes features"
    quick = plain("small-vit-quick")
    quick.load_state_dict(weights("small-vit"))
    del _built["small-vit-quick"]
    assert_same_outputs(clip, quick)


def test_the_parts_of_text_towers(tmp_path: Path) -> None:
    parts = {
        n: load(n, as_pickle(tmp_path / n, weights(n)), tmp_path / "cache").text
        for n in ("small-vit", "small-custom", "small-last")
    }
    for name in ("small-vit", "small-custom"):
        assert (parts[name].causal, parts[name].pools_at_end) == (True, True)
        mask = parts[name].attn_mask_LL
        assert mask is not None
        assert torch.equal(mask, torch.full((77, 77), float("-inf")).triu(1))
    assert (parts["small-last"].causal, parts["small-last"].pools_at_end) == (False, False)
    assert parts["small-last"].attn_mask_LL is None
    assert parts["small-last"].pool_type == "last"
    for text in parts.values():
        assert (text.width, text.heads, text.context_length) == (64, 4, 77)
        assert text.plain_blocks


def test_fingerprints_tell_features_apart(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    path = as_safetensors(tmp_path / "w", weights("small-vit"))
    other_weights = weights("small-vit")
    other_weights["visual.conv1.weight"][0, 0, 0, 0] += 1e-6
    other = as_safetensors(tmp_path / "other", other_weights)
    prints = {
        "plain": load("small-vit", path, cache),
        "bf16": load("small-vit", path, cache, precision="bf16"),
        "quick": load("small-vit-quick", path, cache),
        "weights": load("small-vit", other, cache),
    }
    assert len({c.fingerprint for c in prints.values()}) == len(prints)
    again = load("small-vit", path, tmp_path / "another cache")
    assert again.fingerprint == prints["plain"].fingerprint
    assert again.preprocess_fingerprint == prints["plain"].preprocess_fingerprint
    moved = path.rename(tmp_path / "elsewhere.safetensors")
    assert load("small-vit", moved, cache).fingerprint == again.fingerprint


def test_quick_gelu_really_changes_features(tmp_path: Path) -> None:
    path = as_safetensors(tmp_path / "w", weights("small-vit"))
    features = [
        load(n, path, tmp_path).encode_images(images()) for n in ("small-vit", "small-vit-quick")
    ]
    assert (features[0] - features[1]).abs().max() > 1e-4


def test_bf16_stays_close(tmp_path: Path) -> None:
    path = as_safetensors(tmp_path / "w", weights("small-vit"))
    full, low = (load("small-vit", path, tmp_path, precision=p) for p in ("float32", "bf16"))
    for exact, close in (
        (full.encode_images(images()), low.encode_images(images())),
        (full.encode_text_raw(TEXTS), low.encode_text_raw(TEXTS)),
    ):
        assert close.dtype == torch.float32
        assert not torch.equal(exact, close), "bf16 must really be used"
        assert torch.cosine_similarity(exact, close).min() > 0.99


def test_an_image_has_the_same_features_in_every_batch(tmp_path: Path) -> None:
    clip = load_clip(BackboneConfig(model="tiny"), tmp_path)
    height, width = clip.model.visual.image_size
    images = torch.randn(16, 3, height, width, generator=torch.Generator().manual_seed(1))
    together = clip.encode_images(images)
    for count in (1, 2, 5, 8):
        some = clip.encode_images(images[-count:])
        assert some.shape == (count, clip.embed_dim)
        assert torch.equal(some, together[-count:]), count
