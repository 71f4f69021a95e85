"""Weights: mapped or converted once, shared by processes, and never trusted as code."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.small_models import (
    MODELS,
    as_pickle,
    as_safetensors,
    assert_same_outputs,
    copies,
    half,
    images,
    load,
    plain,
    refused,
    weights,
)

pytestmark = pytest.mark.usefixtures("small_models")


def test_float32_safetensors_are_mapped_where_they_lie(tmp_path: Path) -> None:
    path = as_safetensors(tmp_path / "w", weights("small-vit"))
    clip = load("small-vit", path, tmp_path / "cache")
    assert_same_outputs(clip, plain("small-vit"))
    assert str(path) in Path("/proc/self/maps").read_text()
    assert copies(tmp_path / "cache") == []


def in_shards(path: Path, state: dict[str, Tensor]) -> Path:
    """Two files and their index, as Hugging Face's libraries write large models."""
    names = sorted(state)
    parts = {f"model-{i + 1}-of-2.safetensors": names[i::2] for i in range(2)}
    for name, keys in parts.items():
        save_file({k: state[k] for k in keys}, path.parent / name)
    index = path.parent / "model.safetensors.index.json"
    files = {k: name for name, keys in parts.items() for k in keys}
    index.write_text(json.dumps({"weight_map": files}))
    return index


CHECKPOINTS: dict[str, Callable[[Path, dict[str, Tensor]], Path]] = {
    "pickle": as_pickle,
    "training checkpoint": lambda path, state: as_pickle(
        path,
        {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}},
    ),
    "pickle under another key": lambda path, state: as_pickle(
        path, {"epoch": 3, "model": {f"_orig_mod.module.{k}": v for k, v in state.items()}}
    ),
    "shards with an index": lambda path, state: in_shards(path, half(state)),
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
    stored = load_file(copy)
    assert {k: v.dtype for k, v in stored.items()} == {k: v.dtype for k, v in weights(name).items()}
    assert_same_outputs(first, plain(name))

    def never(*_: object, **__: object) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(open_clip, "load_checkpoint", never)
    # A copy that exists is not locked, so a cache on a read-only file system serves as well.
    monkeypatch.setattr("fedprompt.backbone.weights.FileLock", never)
    second = load(name, path, cache)
    assert str(copy) in Path("/proc/self/maps").read_text()
    assert second.fingerprint == first.fingerprint
    assert torch.equal(second.encode_images(images()), first.encode_images(images()))
    assert sorted(p.suffix for p in (cache / "weights").glob("*.*")) == [".lock", ".safetensors"]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_bfloat16_weights_are_read_as_they_are(tmp_path: Path, suffix: str) -> None:
    state = {
        k: v.bfloat16() if v.is_floating_point() else v for k, v in weights("small-vit").items()
    }
    write = as_pickle if suffix == ".pt" else as_safetensors
    clip = load("small-vit", write(tmp_path / "w", state), tmp_path / "cache")
    for name, tensor in clip.model.state_dict().items():
        assert torch.equal(tensor, state[name].to(tensor.dtype)), name


@pytest.mark.filterwarnings("error")
def test_an_archive_of_torchscript_as_openai_publishes_it(tmp_path: Path) -> None:
    model, tokens = plain("small-vit"), open_clip.get_tokenizer("small-vit")(["a river"] * 3)
    with warnings.catch_warnings(action="ignore"):  # tracing is deprecated, the archives stay
        traced = torch.jit.trace(copy.deepcopy(model), (images(), tokens), check_trace=False)
    traced.half().save(tmp_path / "ViT.pt")
    clip = load("small-vit", tmp_path / "ViT.pt", tmp_path / "cache")
    assert_same_outputs(clip, model)


WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "an image tower": (
        lambda state: {k: v for k, v in state.items() if k.startswith("visual.")},
        "an image tower alone",
    ),
    "a text tower": (
        lambda state: {k: v for k, v in state.items() if not k.startswith("visual.")},
        "a text tower alone",
    ),
    "another model": (lambda _: weights("small-vit-16"), "small-vit-16"),
    "another model with its own text tower": (lambda _: weights("small-custom"), "small-custom"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_file_of_something_else_says_what_it_is(tmp_path: Path, kind: str) -> None:
    change, words = WRONG[kind]
    path = as_pickle(tmp_path / "w", change(weights("small-vit")))
    model = "small-vit-wide" if "with its own" in kind else "small-vit"
    line = refused(lambda: load(model, path, tmp_path / "cache"))
    assert str(path) in line
    assert words in line
    assert copies(tmp_path / "cache") == []


BROKEN_INDEX = {"no JSON": "{", "no map": "{}", "elsewhere": '{"weight_map": {"a": "../w.bin"}}'}


@pytest.mark.parametrize("kind", BROKEN_INDEX)
def test_a_bad_index_of_shards_is_one_line(tmp_path: Path, kind: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(BROKEN_INDEX[kind])
    assert str(index) in refused(lambda: load("small-vit", index, tmp_path / "cache"))


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    index = in_shards(tmp_path / "w", weights("small-vit"))
    (tmp_path / "model-2-of-2.safetensors").unlink()
    line = refused(lambda: load("small-vit", index, tmp_path / "cache"))
    assert str(tmp_path / "model-2-of-2.safetensors") in line


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


def as_bytes(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


BAD_FILES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "garbage pickle": (lambda p: garbage(p.with_suffix(".pt")), "holds no weights"),
    "garbage safetensors": (lambda p: garbage(p.with_suffix(".safetensors")), "holds no weights"),
    "empty": (lambda p: as_bytes(p.with_suffix(".pt"), b""), "holds no weights"),
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


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_checkpoint_is_one_line(tmp_path: Path, kind: str) -> None:
    make, reason = BAD_FILES[kind]
    path = make(tmp_path / "w")
    line = refused(lambda: load("small-vit", path, tmp_path / "cache"))
    assert f"{path} {reason}" in line
    assert len(line) < 500
    assert copies(tmp_path / "cache") == []
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_missing_files(tmp_path: Path) -> None:
    missing = tmp_path / "weights.pt"
    for path in (missing, tmp_path):  # a folder is no file either
        assert f"no checkpoint file {path}" in refused(
            lambda p=path: load("small-vit", p, tmp_path)
        )


def test_a_damaged_copy_is_one_line(tmp_path: Path) -> None:
    path = as_pickle(tmp_path / "w", weights("small-vit"))
    load("small-vit", path, tmp_path / "cache")
    (copy,) = copies(tmp_path / "cache")
    copy.unlink()
    copy.write_bytes(b"half")
    line = refused(lambda: load("small-vit", path, tmp_path / "cache"))
    assert f"{copy} is damaged" in line
    assert "remove it" in line


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    path = as_pickle(tmp_path / "w", weights("small-vit"))
    line = refused(lambda: load("small-vit", path, tmp_path / "file" / "cache"))
    assert "cannot write" in line
    assert "output.cache" in line
    mapped = as_safetensors(tmp_path / "w", weights("small-vit"))
    assert_same_outputs(load("small-vit", mapped, tmp_path / "file" / "cache"), plain("small-vit"))


STAND_INS = {
    "empty": (b"", "empty"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "HTML": (b"\n<!DOCTYPE html><html>403</html>", "HTML page"),
    "zeros": (b"\0" * 4096, "zeros only"),
}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kind", STAND_INS)
def test_a_file_that_only_stands_in_for_weights_is_named(
    tmp_path: Path, kind: str, suffix: str
) -> None:
    content, words = STAND_INS[kind]
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    line = refused(lambda: load("small-vit", path, tmp_path / "cache"))
    assert str(path) in line
    assert words in line


class _Object:
    """Anything that is no tensor."""


@pytest.mark.parametrize("content", [{"model": _Object()}, b"no pickle at all"])
def test_no_advice_to_load_unsafely_reaches_the_user(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "w.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    line = refused(lambda: load("small-vit", path, tmp_path / "cache"))
    assert str(path) in line
    assert "weights_only" not in line
    assert "_Object" in line or "no checkpoint" in line
