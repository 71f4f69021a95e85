"""Models in the layout of the hub: a miniature of BiomedCLIP, and what is wrong with a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import fedprompt
from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import load_clip
from fedprompt.backbone.text_tower import TextTower
from fedprompt.config.schema import BackboneConfig
from fedprompt.errors import UserError
from tests.support.builders import CLASS_NAMES
from tests.support.hub_models import CONTEXT_LENGTH, write_biomedclip
from tests.support.small_models import copies, refused

IMAGES = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))


def load(folder: Path, cache: Path, **options: str) -> FrozenCLIP:
    return load_clip(BackboneConfig(f"local-dir:{folder}", device="cpu", **options), cache)  # type: ignore[arg-type]


def test_a_folder_like_biomedclips_equals_open_clips_model(tmp_path: Path) -> None:
    folder = tmp_path / "BiomedCLIP"
    model = write_biomedclip(folder)
    clip = load(folder, tmp_path / "cache")
    texts = [f"a photo of a {name}." for name in CLASS_NAMES]
    with torch.no_grad():
        text_BD = model.encode_text(clip.tokenizer(texts))
        torch.testing.assert_close(clip.encode_images(IMAGES), model.encode_image(IMAGES))
    torch.testing.assert_close(clip.encode_text_raw(texts), text_BD)
    assert clip.name == "BiomedCLIP"
    assert clip.text.context_length == CONTEXT_LENGTH
    assert clip.mean_std[0].tolist() == pytest.approx([0.48145466, 0.4578275, 0.40821073])
    assert clip.libraries == {"timm", "transformers"}
    tower = TextTower(clip, CLASS_NAMES, 4)
    assert tower(torch.zeros(4, 32)).shape == (6, 32)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    moved = load(folder.rename(elsewhere / folder.name), tmp_path / "cache")
    assert moved.fingerprint == clip.fingerprint


def in_shards(folder: Path) -> None:
    file = folder / "open_clip_pytorch_model.bin"
    state = {k: v.contiguous().half() for k, v in torch.load(file).items() if v.is_floating_point()}
    names = sorted(state)
    parts = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for name, keys in parts.items():
        save_file({k: state[k] for k in keys}, folder / name)
    index = {"weight_map": {k: name for name, keys in parts.items() for k in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    file.unlink()


def test_sharded_half_precision_weights_are_merged_once(tmp_path: Path) -> None:
    model = write_biomedclip(tmp_path / "model")
    in_shards(tmp_path / "model")
    clip = load(tmp_path / "model", tmp_path / "cache")
    expected = model.half().float().encode_image(IMAGES).detach()
    torch.testing.assert_close(clip.encode_images(IMAGES), expected)
    assert len(copies(tmp_path / "cache")) == 1
    shard = tmp_path / "model" / "model-00002-of-00002.safetensors"
    shard.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    line = refused(lambda: load(tmp_path / "model", tmp_path / "cache"))
    assert str(shard) in line
    assert "git lfs pull" in line


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no settings": (lambda f: (f / "open_clip_config.json").unlink(), "open_clip_config.json"),
    "no JSON": (lambda f: (f / "open_clip_config.json").write_text("{"), "open_clip_config.json"),
    "other settings": (lambda f: (f / "open_clip_config.json").write_text("[]"), "'model_cfg'"),
    "no weights": (lambda f: (f / "open_clip_pytorch_model.bin").unlink(), "backbone.checkpoint"),
    "no text tower": (lambda f: (f / "config.json").unlink(), "config.json"),
    "no tokenizer": (lambda f: [p.unlink() for p in f.glob("tokenizer*")], "tokenizer"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_an_incomplete_folder_is_one_line(tmp_path: Path, kind: str) -> None:
    write_biomedclip(tmp_path / "model")
    damage, word = BROKEN[kind]
    damage(tmp_path / "model")
    line = refused(lambda: load(tmp_path / "model", tmp_path / "cache"))
    assert word in line
    assert "model" in line


def test_no_folder_and_a_tag_beside_a_folder(tmp_path: Path) -> None:
    line = refused(lambda: load(tmp_path / "nowhere", tmp_path))
    assert str(tmp_path / "nowhere") in line
    with pytest.raises(UserError, match=r"backbone\.pretrained"):
        BackboneConfig("local-dir:x", pretrained="openai").check()
    BackboneConfig("hf-hub:owner/name").check()


def test_a_model_on_the_hub_comes_from_the_hubs_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline, the snapshot in the cache of the hub serves."""
    snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / ("0" * 40)
    write_biomedclip(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    config = BackboneConfig("hf-hub:owner/name", device="cpu")
    # The tokenizer is another model's on the hub, as in BiomedCLIP's own settings.
    line = refused(lambda: load_clip(config, tmp_path / "cache"))
    assert "tokenizer of hf-hub:owner/name" in line
    settings = json.loads((snapshot / "open_clip_config.json").read_text())
    settings["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = str(snapshot)
    (snapshot / "open_clip_config.json").write_text(json.dumps(settings))
    assert load_clip(config, tmp_path / "cache").name == "owner/name"
    missing = BackboneConfig("hf-hub:owner/other", device="cpu")
    assert "owner/other" in refused(lambda: load_clip(missing, tmp_path / "cache"))


def test_biomedcoop_on_a_model_like_biomedclip(tmp_path: Path) -> None:
    """Two clients and two rounds, from a folder of images to accuracies."""
    write_biomedclip(tmp_path / "BiomedCLIP")
    shades = {"beach": 220, "forest": 90, "harbor": 20}
    for name, grey in shades.items():
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(8):
            picture = Image.new("RGB", (32, 32), (grey, grey + i, 99))
            picture.save(tmp_path / "images" / name / f"{i}.png")
    result = fedprompt.run(
        "label_skew",
        method="biomedcoop",
        data="image_folder",
        **{
            "backbone.model": f"local-dir:{tmp_path / 'BiomedCLIP'}",
            "backbone.device": "cpu",
            "data.root": tmp_path / "images",
            "data.descriptions": "aerial_scenes",
            "partition.clients": 2,
            "partition.scheme": "iid",
            "training.lr": 20,
            "federation.rounds": 2,
            "output.dir": tmp_path / "run",
            "output.report": False,
        },
    )
    before, _, after = result.metrics
    assert after["clients.accepted"] == 2
    assert after["global.loss"] < before["global.loss"]
    assert len(after["personal.accuracy"]) == 2
