from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fedprompt.data.cache_files import default_cache_dir
from fedprompt.data.features.cache import feature_path
from fedprompt.data.features.checked import CheckedRows
from fedprompt.errors import UserError
from tests.support.fake_data import FakeClip, flat_dataset, plain_features

DATASET = flat_dataset([0, 1, 2, 0, 1, 2, 0, 1])
fork = multiprocessing.get_context("fork")


def uncached(clip: FakeClip) -> np.ndarray:
    images = [clip.preprocess(DATASET.open_image(i)) for i in range(len(DATASET))]
    return clip.encode_images(torch.stack(images)).numpy()


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*") if p.is_file() and ".npy.lock" not in p.name)


def test_cached_equals_uncached_and_is_computed_once(tmp_path: Path) -> None:
    clip = FakeClip()
    features_ND = plain_features(clip, DATASET, tmp_path)
    assert clip.batches == [3, 3, 2]
    assert np.array_equal(features_ND, uncached(FakeClip()))
    assert isinstance(features_ND, CheckedRows)
    assert features_ND.dtype == np.float32
    again = FakeClip()
    assert np.array_equal(plain_features(again, DATASET, tmp_path), features_ND)
    assert again.batches == []
    assert leftovers(tmp_path) == [feature_path(clip, DATASET, tmp_path).name]
    with pytest.raises(ValueError, match="read-only"):
        features_ND[0:1][0, 0] = 1.0


def test_rows_keep_the_image_order_whichever_decodes_first(tmp_path: Path) -> None:
    def slow_first(index: int) -> Image.Image:
        time.sleep(0.01 * (len(DATASET) - index))
        return DATASET.open_image(index)

    dataset = replace(DATASET, open_image=slow_first)
    assert np.array_equal(plain_features(FakeClip(), dataset, tmp_path), uncached(FakeClip()))


def test_anything_that_changes_features_changes_the_file(tmp_path: Path) -> None:
    clip, other_weights, other_pixels = FakeClip(), FakeClip(fingerprint="other"), FakeClip()
    other_pixels.preprocess_fingerprint = "other"
    paths = [
        feature_path(clip, DATASET, tmp_path),
        feature_path(clip, DATASET, tmp_path, view="flip"),
        feature_path(other_weights, DATASET, tmp_path),
        feature_path(other_pixels, DATASET, tmp_path),
        feature_path(clip, replace(DATASET, fingerprint="other"), tmp_path),
    ]
    assert len(set(paths)) == 5
    assert paths[0].parent == paths[1].parent == paths[2].parent != paths[4].parent


@pytest.mark.parametrize("damage", ["truncated", "empty", "longer", "wrong shape", "float64"])
def test_a_damaged_file_is_computed_again(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = feature_path(FakeClip(), DATASET, tmp_path)
    plain_features(FakeClip(), DATASET, tmp_path)
    whole = path.read_bytes()
    if damage == "wrong shape":
        np.save(path, np.zeros((7, 4), np.float32))
    elif damage == "float64":
        np.save(path, np.zeros((8, 4), np.float64))
    else:
        path.write_bytes({"truncated": whole[:-1], "empty": b"", "longer": whole + b"x"}[damage])
    assert np.array_equal(plain_features(FakeClip(), DATASET, tmp_path), uncached(FakeClip()))
    assert "computed again" in caplog.text
    assert path.read_bytes() == whole


class SlowClip(FakeClip):
    """Notes every batch in a file that processes share."""

    def __init__(self, notes: Path) -> None:
        super().__init__()
        self.notes = notes

    def encode_images(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        with self.notes.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.1)
        return super().encode_images(images_BCHW)


def start_together(barrier: Any, cache_dir: Path, notes: Path, result: Path) -> None:
    barrier.wait()
    np.save(result, plain_features(SlowClip(notes), DATASET, cache_dir))


def test_two_processes_at_once_compute_it_once(tmp_path: Path) -> None:
    barrier, notes = fork.Barrier(2), tmp_path / "notes"
    results = [tmp_path / "one.npy", tmp_path / "two.npy"]
    processes = [
        fork.Process(target=start_together, args=(barrier, tmp_path / "cache", notes, result))
        for result in results
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(notes.read_text().splitlines()) == 3  # 8 images in batches of 3, by one process
    for result in results:
        assert np.array_equal(np.load(result), uncached(FakeClip()))


class HangingClip(FakeClip):
    """Stops for good in its second batch."""

    def __init__(self, reached: Any) -> None:
        super().__init__()
        self.reached = reached

    def encode_images(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        if self.batches:
            self.reached.set()
            time.sleep(600)
        return super().encode_images(images_BCHW)


def hang(reached: Any, cache_dir: Path) -> None:
    plain_features(HangingClip(reached), DATASET, cache_dir)


def test_a_process_killed_while_writing_leaves_nothing_wrong(tmp_path: Path) -> None:
    reached = fork.Event()
    process = fork.Process(target=hang, args=(reached, tmp_path))
    process.start()
    assert reached.wait(timeout=60)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(timeout=60)
    name = feature_path(FakeClip(), DATASET, tmp_path).name
    (torn,) = leftovers(tmp_path)
    assert torn.startswith(f".{name}.")
    assert torn.endswith(".tmp")
    assert np.array_equal(plain_features(FakeClip(), DATASET, tmp_path), uncached(FakeClip()))
    assert leftovers(tmp_path) == [name]


def test_a_full_disk_is_said_in_one_line(tmp_path: Path) -> None:
    # A file size limit makes the kernel refuse a write half-way, as a full disk does.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write .*set output\.cache or") as caught:
            plain_features(FakeClip(), DATASET, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert leftovers(tmp_path) == []
    assert plain_features(FakeClip(), DATASET, tmp_path).shape == (8, 4)


def test_a_cache_folder_that_cannot_be_made_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"\$FEDPROMPT_CACHE"):
        plain_features(FakeClip(), DATASET, tmp_path / "file" / "cache")


def test_an_image_that_fails_ends_the_pass_and_frees_the_lock(tmp_path: Path) -> None:
    def fails(index: int) -> Image.Image:
        raise UserError("gone")

    with pytest.raises(UserError, match="gone"):
        plain_features(FakeClip(), replace(DATASET, open_image=fails), tmp_path)
    assert leftovers(tmp_path) == []
    assert plain_features(FakeClip(), DATASET, tmp_path).shape == (8, 4)


def test_features_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    clip = FakeClip()
    clip.projection[0, 0] = float("nan")
    with pytest.raises(UserError, match="images 0 to 2 are not finite"):
        plain_features(clip, DATASET, tmp_path)
    assert leftovers(tmp_path) == []


def test_start_and_end_are_plain_lines_where_there_is_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain_features(FakeClip(), DATASET, tmp_path / "quiet", progress=False)
    assert capsys.readouterr() == ("", "")
    plain_features(FakeClip(), DATASET, tmp_path)
    out, err = capsys.readouterr()
    assert out == ""
    start, end = err.splitlines()
    assert start.startswith("encoding 8 images of flat")
    assert end.startswith("encoded 8 images in ")
    plain_features(FakeClip(), DATASET, tmp_path)
    assert capsys.readouterr() == ("", "")


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("FEDPROMPT_CACHE", "/fast")
    assert default_cache_dir("~/mine") == Path("/home/someone/mine")
    assert default_cache_dir(None) == Path("/fast")
    monkeypatch.delenv("FEDPROMPT_CACHE")
    assert default_cache_dir(None) == Path("/home/someone/.cache/fedprompt")
