"""Loading a backbone: every kind of model, and one clear line where it is impossible."""

from __future__ import annotations

import logging
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedprompt.backbone.loading import load_clip
from fedprompt.config.schema import BackboneConfig
from tests.support.small_models import (
    as_pickle,
    assert_same_outputs,
    load,
    plain,
    refused,
    weights,
)

pytestmark = pytest.mark.usefixtures("small_models")

LOADABLE = [
    "small-vit",
    "small-vit-quick",
    "small-vit-16",
    "small-rn",
    "small-custom",
    "small-last",
    "small-coca",
]


@pytest.mark.parametrize("name", LOADABLE)
def test_every_kind_of_model_equals_open_clips(tmp_path: Path, name: str) -> None:
    clip = load(name, as_pickle(tmp_path / "w", weights(name)), tmp_path / "cache")
    assert_same_outputs(clip, plain(name))
    tensors = [*clip.model.named_parameters(), *clip.model.named_buffers()]
    assert [n for n, t in tensors if t.is_meta] == []
    buffers = dict(plain(name).named_buffers())
    for buffer_name, buffer in clip.model.named_buffers():
        assert torch.equal(buffer, buffers[buffer_name]), buffer_name


def test_loading_leaves_the_global_rng_alone(tmp_path: Path) -> None:
    path = as_pickle(tmp_path / "w", weights("small-vit"))
    state = torch.random.get_rng_state()
    load("small-vit", path, tmp_path / "cache")
    assert torch.equal(torch.random.get_rng_state(), state)


def test_loading_is_quiet(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    path = as_pickle(tmp_path / "w", weights("small-vit"))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        load("small-vit", path, tmp_path / "cache")
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")


def test_unknown_models_and_tags_name_the_nearest(tmp_path: Path) -> None:
    config = BackboneConfig(model="ViT-B16", pretrained="openai", device="cpu")
    line = refused(lambda: load_clip(config, tmp_path))
    assert "'ViT-B16'" in line
    assert "ViT-B-16" in line.partition("'ViT-B16'")[2], "the nearest name"
    nothing = replace(config, model="zzz")
    assert "list_models()" in refused(lambda: load_clip(nothing, tmp_path))
    tag = replace(config, model="ViT-B-16", pretrained="opena")
    line = refused(lambda: load_clip(tag, tmp_path))
    assert "'opena'" in line
    assert "'openai'" in line


def test_a_text_tower_without_settings_is_one_line_before_any_weights(tmp_path: Path) -> None:
    line = refused(lambda: load("small-hf", tmp_path / "not even there.pt", tmp_path))
    assert "small-hf" in line
    assert "no/such-text-tower" in line
    assert "config.json" in line


def test_a_package_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    for name in ("small-hf", "small-tokenizer"):
        line = refused(lambda n=name: load(n, tmp_path / "not even there.pt", tmp_path))
        assert "fedprompt[hf]" in line


def test_a_tokenizer_that_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    line = refused(lambda: load("small-tokenizer", tmp_path / "w.pt", tmp_path))
    assert "tokenizer of small-tokenizer" in line


def test_a_tag_without_a_connection_is_one_line_and_quick(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    config = BackboneConfig(model="ViT-B-16", pretrained="openai", device="cpu")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    began = time.monotonic()
    line = refused(lambda: load_clip(config, tmp_path))
    assert time.monotonic() - began < 5
    assert "'openai'" in line
    assert "ViT-B-16" in line
    assert "backbone.checkpoint=FILE" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_one_line(tmp_path: Path) -> None:
    line = refused(lambda: load_clip(BackboneConfig(device="cuda"), tmp_path))
    assert "'cuda'" in line
    assert "'auto'" in line
