"""The tiny CLIP: its file, strict loading, damage, where it is found, and its accuracy."""

import hashlib
import importlib.metadata
import json

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import CLIP
from PIL import Image

from fedprompt import files as installed
from fedprompt.backbone import tiny
from fedprompt.data import aerial_scenes as scenes
from fedprompt.errors import UserError

IMAGES = 2  # per class and domain: 8 images a class, 160 in all


@pytest.fixture(scope="module")
def model():
    built = CLIP(**tiny.tiny_model_config())
    built.load_state_dict(tiny.tiny_state_dict(), strict=True)
    return built.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def features(model):
    """Normalised image features and labels on the federated domains."""
    card = tiny.tiny_card()["preprocess_cfg"]
    transform = open_clip.image_transform(64, is_train=False, mean=card["mean"], std=card["std"])
    pictures, labels = [], []
    for label, name in enumerate(scenes.CLASSES):
        for domain in scenes.FEDERATED_DOMAINS:
            for index in range(IMAGES):
                pictures.append(transform(Image.fromarray(scenes.render(name, domain, index))))
                labels.append(label)
    return model.encode_image(torch.stack(pictures), normalize=True), np.array(labels)


def predict(model, image_ND, names):
    tokens = open_clip.SimpleTokenizer()([f"a photo of a {name}." for name in names])
    return (image_ND @ model.encode_text(tokens, normalize=True).T).argmax(1).numpy()


def test_the_file_is_small_and_matches_its_card():
    data = tiny.tiny_weights_path().read_bytes()
    card = tiny.tiny_card()
    assert len(data) == card["bytes"] < 5_000_000
    assert hashlib.sha256(data).hexdigest() == card["sha256"]
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    provenance = json.loads(header["provenance"])
    assert {key: card[key] for key in provenance} == provenance
    assert card["scenes_version"] == scenes.VERSION


def test_state_is_complete_float32_and_quick():
    state = tiny.tiny_state_dict()
    assert state["token_embedding.weight"].shape == (49408, 128)
    assert state["positional_embedding"].shape[0] == 77
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    assert all(torch.isfinite(tensor).all() for tensor in state.values())


def test_untouched_token_rows_are_the_seeded_draw():
    state = tiny.tiny_state_dict()["token_embedding.weight"]
    drawn = tiny.initial_embedding(*state.shape, tiny.tiny_card()["seed"])
    same = (state == drawn).all(1)
    words = open_clip.SimpleTokenizer()(["runway"])[0, :3]
    assert not same[words].any()
    assert int((~same).sum()) < 1000


def test_zero_shot_is_well_above_chance(model, features):
    image_ND, labels = features
    assert (predict(model, image_ND, scenes.CLASSES) == labels).mean() > 0.30  # chance: 0.05


def test_held_out_classes_are_above_chance(model, features):
    image_ND, labels = features
    held = [scenes.CLASSES.index(name) for name in scenes.HELD_OUT_CLASSES]
    is_held_out = np.isin(labels, held)
    among_all = predict(model, image_ND, scenes.CLASSES)[is_held_out]
    assert (among_all == labels[is_held_out]).mean() > 0.12  # chance: 0.05
    among_held = np.array(held)[predict(model, image_ND, scenes.HELD_OUT_CLASSES)[is_held_out]]
    assert (among_held == labels[is_held_out]).mean() > 0.40  # chance: 0.25


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_file_is_one_clear_line(tmp_path, monkeypatch, damage):
    data = bytearray(tiny.tiny_weights_path().read_bytes())
    if damage == "flip":
        data[-1] ^= 1
    broken = tmp_path / tiny.WEIGHTS_NAME
    broken.write_bytes({"flip": data, "cut": data[:1000], "empty": b""}[damage])
    monkeypatch.setattr(installed, "_candidates", lambda name: [broken])
    with pytest.raises(UserError, match=r"does not match tiny_clip\.json: .*reinstall"):
        tiny.tiny_state_dict()


def test_a_bundle_without_weights_uses_the_installed_package(tmp_path, monkeypatch):
    assets = tmp_path / "site" / "fedprompt" / "backbone" / "assets"
    assets.mkdir(parents=True)
    (assets / tiny.WEIGHTS_NAME).write_bytes(b"weights")
    bundle = tmp_path / "bundle" / "fedprompt"
    bundle.mkdir(parents=True)
    monkeypatch.setattr(installed.resources, "files", lambda package: bundle)

    class Installed:
        def locate_file(self, path):
            return tmp_path / "site" / path

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Installed())
    assert tiny.tiny_weights_path() == assets / tiny.WEIGHTS_NAME

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    monkeypatch.setattr(installed.sys, "path", [str(tmp_path / "bundle"), str(tmp_path / "site")])
    assert tiny.tiny_weights_path() == assets / tiny.WEIGHTS_NAME
    monkeypatch.setattr(installed.sys, "path", [str(tmp_path / "bundle")])
    with pytest.raises(UserError, match="install the package"):
        tiny.tiny_weights_path()
