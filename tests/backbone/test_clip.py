from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import CLIP, CustomTextCLIP
from PIL import Image
from safetensors.torch import load_file, save_file
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
    # SigLIP's text tower: every position sees every other, the last one is the feature.
    "small-last": {
        **SMALL,
        "custom_text": True,
        "init_logit_bias": -10,
        "text_cfg": {**TEXT, "no_causal_mask": True, "pool_type": "last", "proj_bias": True},
    },
    "small-hf": {**SMALL, "text_cfg": {"hf_model_name": "roberta-base"}},
    "small-coca": {**SMALL, "multimodal_cfg": {"layers": 1}},
    "small-tokenizer": {**SMALL, "text_cfg": {**TEXT, "hf_tokenizer_name": "no/such-tokenizer"}},
}
LOADABLE = [
    "small-vit",
    "small-vit-quick",
    "small-vit-16",
    "small-rn",
    "small-custom",
    "small-last",
]
TEXTS = ["a photo of a river.", "beach"]


@pytest.fixture(scope="module", autouse=True)
def _models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The small architectures, by name, as open_clip finds its own."""
    folder = tmp_path_factory.mktemp("models")
    for name, cfg in MODELS.items():
        (folder / f"{name}.json").write_text(json.dumps(cfg))
    paths, configs = open_clip.factory._MODEL_CONFIG_PATHS, open_clip.factory._MODEL_CONFIGS
    before_paths, before_configs = list(paths), dict(configs)
    open_clip.add_model_config(folder)
    yield
    paths[:] = before_paths
    configs.clear()
    configs.update(before_configs)


_plain: dict[str, CLIP | CustomTextCLIP] = {}


def plain(name: str) -> CLIP | CustomTextCLIP:
    """open_clip's own model with seeded random weights: what all loaded ones must equal."""
    if name not in _plain:
        with torch.random.fork_rng():
            torch.manual_seed(len(name))
            model = open_clip.create_model(name).eval()
            for parameter in model.parameters():
                # Round numbers: they survive float16, and no tower is near to another.
                parameter.data = parameter.data.half().float()
        _plain[name] = model
    return _plain[name]


def weights(name: str) -> dict[str, Tensor]:
    """Its weights in tensors of their own."""
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
        image_BD, text_BD = model.encode_image(images()), model.encode_text(tokens)
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


# The wrapper


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
    one = clip.encode_text_raw(["a beach.", "the beach from above"])
    mean = (one / one.norm(dim=-1, keepdim=True)).mean(0)
    torch.testing.assert_close(classes_CD[1], mean / mean.norm())
    torch.testing.assert_close(classes_CD.norm(dim=-1), torch.ones(2))


@pytest.mark.parametrize("size", [(32, 32), (80, 50), (20, 31)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_preprocess_is_open_clips_own(tmp_path: Path, size: tuple[int, int], mode: str) -> None:
    clip = load("small-vit", as_pickle(tmp_path / "w", weights("small-vit")), tmp_path)
    _, _, own = open_clip.create_model_and_transforms("small-vit")
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    assert torch.equal(clip.preprocess(image), own(image))


def test_a_tags_own_settings_hold_beside_a_checkpoint(
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
    own = open_clip.transform.image_transform_v2(preprocess, is_train=False)
    image = Image.effect_mandelbrot((60, 40), (-3, -2.5, 2, 2.5), 50).convert("RGB")
    assert torch.equal(clip.preprocess(image), own(image))
    assert clip.preprocess_fingerprint != plain_clip.preprocess_fingerprint
    assert clip.fingerprint != plain_clip.fingerprint, "the activation changes features"
    quick = plain("small-vit-quick")
    quick.load_state_dict(weights("small-vit"))
    del _plain["small-vit-quick"]
    assert_same_outputs(clip, quick)


# Loading


@pytest.mark.parametrize("name", LOADABLE)
def test_every_kind_of_model_equals_open_clips(tmp_path: Path, name: str) -> None:
    clip = load(name, as_pickle(tmp_path / "w", weights(name)), tmp_path / "cache")
    assert_same_outputs(clip, plain(name))
    tensors = [*clip.model.named_parameters(), *clip.model.named_buffers()]
    assert [n for n, t in tensors if t.is_meta] == []
    own = dict(plain(name).named_buffers())
    for buffer_name, buffer in clip.model.named_buffers():
        assert torch.equal(buffer, own[buffer_name]), buffer_name


def test_what_the_prompts_are_told_about_the_text_tower(tmp_path: Path) -> None:
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


def test_loading_leaves_the_global_rng_alone(tmp_path: Path) -> None:
    path = as_pickle(tmp_path / "w", weights("small-vit"))
    state = torch.random.get_rng_state()
    load("small-vit", path, tmp_path / "cache")
    assert torch.equal(torch.random.get_rng_state(), state)


def test_float32_safetensors_are_mapped_where_they_lie(tmp_path: Path) -> None:
    path = as_safetensors(tmp_path / "w", weights("small-vit"))
    clip = load("small-vit", path, tmp_path / "cache")
    assert_same_outputs(clip, plain("small-vit"))
    assert str(path) in Path("/proc/self/maps").read_text()
    assert copies(tmp_path / "cache") == []


CHECKPOINTS: dict[str, Callable[[Path, dict[str, Tensor]], Path]] = {
    "pickle": as_pickle,
    "training checkpoint": lambda path, state: as_pickle(
        path,
        {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}},
    ),
    "half-precision pickle": lambda path, state: as_pickle(path, half(state)),
    "half-precision safetensors": lambda path, state: as_safetensors(path, half(state)),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
@pytest.mark.parametrize("name", ["small-vit", "small-rn"])
def test_other_checkpoints_are_converted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, name: str
) -> None:
    path, cache = CHECKPOINTS[kind](tmp_path / "w", weights(name)), tmp_path / "cache"
    first = load(name, path, cache)
    (copy,) = copies(cache)
    kept = load_file(copy)
    assert {k: v.dtype for k, v in kept.items()} == {k: v.dtype for k, v in weights(name).items()}
    assert_same_outputs(first, plain(name))

    def never(*_: object, **__: object) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(open_clip, "load_checkpoint", never)
    # Not even locked: a cache that others may only read serves them too.
    monkeypatch.setattr("fedprompt.backbone.loading.FileLock", never)
    second = load(name, path, cache)
    assert str(copy) in Path("/proc/self/maps").read_text()
    assert second.fingerprint == first.fingerprint
    assert torch.equal(second.encode_images(images()), first.encode_images(images()))
    assert sorted(p.suffix for p in (cache / "weights").glob("*.*")) == [".lock", ".safetensors"]


def test_a_new_file_under_an_old_name_is_seen(tmp_path: Path) -> None:
    path = as_pickle(tmp_path / "w", weights("small-vit"))
    first = load("small-vit", path, tmp_path / "cache")
    state = weights("small-vit")
    state["visual.conv1.weight"] += 1
    os.utime(as_pickle(tmp_path / "w", state), ns=(1, 1))
    second = load("small-vit", path, tmp_path / "cache")
    assert second.fingerprint != first.fingerprint
    assert not torch.equal(second.encode_images(images()), first.encode_images(images()))


CHILD = """
import sys
from pathlib import Path
import open_clip, torch
from fedprompt.backbone.loading import load_clip
from fedprompt.config.schema import BackboneConfig
open_clip.add_model_config(Path(sys.argv[1]))
config = BackboneConfig(model="small-vit", checkpoint=sys.argv[2], device="cpu")
clip = load_clip(config, Path(sys.argv[3]))
clip.encode_text_raw(["a river"])
clip.encode_images(torch.zeros(2, 3, 32, 32))
clip.text.token_embedding.weight.sum()
print(clip.fingerprint, flush=True)
sys.stdin.read()
"""


def mapped_kib(pid: int, name: str) -> dict[str, int]:
    """What the kernel says about one process's mapping of a file, KiB by kind."""
    totals: dict[str, int] = {}
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        fields = line.split()
        if not fields[0].endswith(":"):
            inside = line.endswith(name)
        elif inside and fields[-1] == "kB":
            totals[fields[0][:-1]] = totals.get(fields[0][:-1], 0) + int(fields[1])
    return totals


def test_processes_share_one_copy_in_memory(tmp_path: Path) -> None:
    (tmp_path / "small-vit.json").write_text(json.dumps(MODELS["small-vit"]))
    path = as_pickle(tmp_path / "w", half(weights("small-vit")))
    clip = load("small-vit", path, tmp_path / "cache")
    clip.encode_text_raw(["a river"])
    clip.encode_images(torch.zeros(2, 3, 32, 32))
    clip.text.token_embedding.weight.sum()
    (copy,) = copies(tmp_path / "cache")
    paths = (tmp_path / "small-vit.json", path, tmp_path / "cache")
    command = [sys.executable, "-c", CHILD, *map(str, paths)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline().strip() == clip.fingerprint, "stable across processes"
        for pid in (child.pid, os.getpid()):
            pages = mapped_kib(pid, str(copy))
            assert pages["Rss"] > 0.9 * copy.stat().st_size / 1024
            assert pages["Private_Dirty"] == 0, "a write would give this process its own copy"
            assert pages["Shared_Clean"] == pages["Rss"]
    finally:
        child.communicate("")


# Fingerprints


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


# Refusals


class Boom:
    """Leaves a trace when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_checkpoint_is_never_executed(tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    path = as_pickle(tmp_path / "w", {"state_dict": Boom(trace)})
    line = refused(lambda: load("small-vit", path, tmp_path / "cache"))
    assert f"{path} does not hold weights of small-vit" in line
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists(), "the same file does execute where pickles are trusted"


def truncated(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-1000])
    return path


def garbage(path: Path) -> Path:
    path.write_bytes(b"<html>404 not found</html>" * 40)
    return path


BAD_FILES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "garbage pickle": (lambda p: garbage(p.with_suffix(".pt")), "does not hold weights of"),
    "garbage safetensors": (
        lambda p: garbage(p.with_suffix(".safetensors")),
        "is not a readable safetensors file",
    ),
    "empty": (lambda p: as_bytes(p.with_suffix(".pt"), b""), "does not hold weights of"),
    "truncated pickle": (
        lambda p: truncated(as_pickle(p, weights("small-vit"))),
        "does not hold weights of",
    ),
    "truncated safetensors": (
        lambda p: truncated(as_safetensors(p, weights("small-vit"))),
        "is not a readable safetensors file",
    ),
    "a list": (lambda p: as_pickle(p, [1, 2]), "does not hold weights of"),
    "a number": (lambda p: as_pickle(p, 3), "does not hold weights of"),
    "no tensors": (lambda p: as_pickle(p, {}), "does not hold weights of"),
    "one tensor": (lambda p: as_pickle(p, {"x": torch.zeros(1)}), "does not hold weights of"),
    "one missing": (
        lambda p: as_safetensors(
            p, {k: v for k, v in weights("small-vit").items() if "ln_" not in k}
        ),
        "does not hold weights of",
    ),
    "other widths": (lambda p: as_pickle(p, weights("small-vit-wide")), "does not hold weights of"),
    "other tower": (lambda p: as_safetensors(p, weights("small-rn")), "does not hold weights of"),
    "other text": (lambda p: as_pickle(p, weights("small-last")), "does not hold weights of"),
}


def as_bytes(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_checkpoint_is_one_line(tmp_path: Path, kind: str) -> None:
    make, reason = BAD_FILES[kind]
    path = make(tmp_path / "w")
    line = refused(lambda: load("small-vit", path, tmp_path / "cache"))
    assert f"{path} {reason}" in line
    assert len(line) < 500
    assert copies(tmp_path / "cache") == []
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_files_that_are_not_there(tmp_path: Path) -> None:
    missing = tmp_path / "weights.pt"
    assert refused(lambda: load("small-vit", missing, tmp_path)) == (
        f"backbone: no checkpoint file {missing}."
    )
    assert "no checkpoint file" in refused(lambda: load("small-vit", tmp_path, tmp_path))


def test_a_damaged_copy_is_one_line(tmp_path: Path) -> None:
    path = as_pickle(tmp_path / "w", weights("small-vit"))
    load("small-vit", path, tmp_path / "cache")
    (copy,) = copies(tmp_path / "cache")
    copy.unlink()
    copy.write_bytes(b"half")
    line = refused(lambda: load("small-vit", path, tmp_path / "cache"))
    assert line.startswith(f"backbone: {copy} is damaged (")
    assert line.endswith("remove it.")


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    path = as_pickle(tmp_path / "w", weights("small-vit"))
    line = refused(lambda: load("small-vit", path, tmp_path / "file" / "cache"))
    assert "cannot write" in line
    assert "output.cache" in line
    mapped = as_safetensors(tmp_path / "w", weights("small-vit"))
    assert_same_outputs(load("small-vit", mapped, tmp_path / "file" / "cache"), plain("small-vit"))


def test_unknown_models_and_tags_name_the_nearest(tmp_path: Path) -> None:
    config = BackboneConfig(model="ViT-B16", pretrained="openai", device="cpu")
    line = refused(lambda: load_clip(config, tmp_path))
    assert line.startswith("backbone: open_clip has no model 'ViT-B16'. Nearest: ViT-B-16")
    nothing = replace(config, model="zzz")
    assert "See open_clip.list_models()" in refused(lambda: load_clip(nothing, tmp_path))
    tag = replace(config, model="ViT-B-16", pretrained="opena")
    assert refused(lambda: load_clip(tag, tmp_path)) == (
        "backbone: model 'ViT-B-16' has no pretrained tag 'opena'. Did you mean 'openai'?"
    )


@pytest.mark.parametrize("name", ["small-hf", "small-coca"])
def test_towers_that_take_no_prompts_are_refused_before_any_download(
    tmp_path: Path, name: str
) -> None:
    line = refused(lambda: load(name, tmp_path / "not even there.pt", tmp_path))
    assert line.startswith(f"backbone: prompts cannot be threaded through the text tower of {name}")


def test_a_tokenizer_that_cannot_be_had_is_one_line(tmp_path: Path) -> None:
    line = refused(lambda: load("small-tokenizer", tmp_path / "w.pt", tmp_path))
    assert line.startswith("backbone: the tokenizer of small-tokenizer cannot be had: ")


def test_a_tag_without_a_connection_is_one_line_and_quick(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    config = BackboneConfig(model="ViT-B-16", pretrained="openai", device="cpu")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    began = time.monotonic()
    line = refused(lambda: load_clip(config, tmp_path))
    assert time.monotonic() - began < 5
    assert line.startswith("backbone: weights 'openai' of ViT-B-16 could not be downloaded (")
    assert "backbone.checkpoint=FILE" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    line = refused(lambda: load_clip(BackboneConfig(device="cuda"), tmp_path))
    assert line == "backbone: device 'cuda' asked for, but PyTorch sees no GPU; use 'auto'."


def test_loading_is_quiet(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    path = as_pickle(tmp_path / "w", weights("small-vit"))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        load("small-vit", path, tmp_path / "cache")
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")
