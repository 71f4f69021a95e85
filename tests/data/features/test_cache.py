from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fedprompt.data.cache_files import default_cache_dir, digest
from fedprompt.data.dataset import ImageDataset
from fedprompt.data.features.cache import cached
from fedprompt.data.features.encoding import augmented, plain
from fedprompt.errors import DamagedFile, UserError
from tests.support.fake_data import FakeClip, flat_dataset, plain_features

DATASET = flat_dataset([0, 1, 2, 0, 1, 2, 0, 1])
fork = multiprocessing.get_context("fork")


def uncached(clip: FakeClip, dataset: ImageDataset = DATASET) -> np.ndarray:
    images = [clip.preprocess(dataset.open_image(i)) for i in range(len(dataset))]
    return clip.encode_images(torch.stack(images)).numpy()


def contents(colours: Sequence[int], place: str = "somewhere", **fields: Any) -> ImageDataset:
    """A data set of flat images that are known by their content."""
    return replace(
        flat_dataset([0] * len(colours)),
        open_image=lambda i: Image.new("RGB", (8, 8), (colours[i], 7, 0)),
        pixel_keys=tuple(digest(str(colour)) for colour in colours),
        fingerprint=str(colours),
        place=place,
        **fields,
    )


def files(folder: Path) -> list[str]:
    """What lies in the folders of encodings, as `number.suffix`."""
    return sorted(p.name[33:] for p in (folder / "features").glob("*/*"))


def test_cached_equals_uncached_and_is_computed_once(tmp_path: Path) -> None:
    clip = FakeClip()
    features_ND = plain_features(clip, DATASET, tmp_path)
    assert clip.batches == [3, 3, 2]
    assert np.array_equal(features_ND, uncached(FakeClip()))
    assert features_ND.shape == (8, 4)
    assert features_ND.dtype == np.float32
    again = FakeClip()
    assert np.array_equal(plain_features(again, DATASET, tmp_path), features_ND)
    assert again.batches == []
    assert files(tmp_path) == ["0.index", "0.rows"]
    with pytest.raises(ValueError, match="read-only"):
        features_ND[0:1][0, 0] = 1.0


def test_rows_keep_the_image_order_whichever_decodes_first(tmp_path: Path) -> None:
    def slow_first(index: int) -> Image.Image:
        time.sleep(0.01 * (len(DATASET) - index))
        return DATASET.open_image(index)

    dataset = replace(DATASET, open_image=slow_first)
    assert np.array_equal(plain_features(FakeClip(), dataset, tmp_path), uncached(FakeClip()))


def test_anything_that_changes_features_changes_the_row(tmp_path: Path) -> None:
    plain_features(FakeClip(), DATASET, tmp_path)
    other_weights, other_pixels = FakeClip(fingerprint="other"), FakeClip()
    other_pixels.preprocess_fingerprint = "other"
    for clip, dataset in (
        (other_weights, DATASET),
        (other_pixels, DATASET),
        (FakeClip(), replace(DATASET, fingerprint="other")),
    ):
        plain_features(clip, dataset, tmp_path)
        assert sum(clip.batches) == 8


def test_only_new_content_is_encoded(tmp_path: Path) -> None:
    clip = FakeClip(image_batch=64)
    for colours, place, new in (
        ((1, 2, 3, 4, 5, 6), "a", 6),
        ((1, 2, 9, 4, 5, 6), "a", 1),  # changed
        ((1, 2, 9, 4, 7, 5, 6), "a", 1),  # added
        ((2, 9, 4, 7, 6), "a", 0),  # removed
        ((6, 7, 4, 9, 2), "a", 0),  # in another order, as after other labels
        ((6, 7, 4, 9, 2), "b", 0),  # moved
        ((6, 6, 8, 8, 2), "b", 1),  # copies
    ):
        clip.batches.clear()
        dataset = contents(colours, place)
        rows = plain_features(clip, dataset, tmp_path)
        assert sum(clip.batches) == new, colours
        assert np.array_equal(rows, uncached(FakeClip(), dataset))
        for index in (np.array([4, 0, -1]), slice(1, 4), 2):
            assert np.array_equal(rows[index], uncached(FakeClip(), dataset)[index])


def test_crops_depend_on_the_number_of_an_image_too(tmp_path: Path) -> None:
    clip = FakeClip()

    def crops(dataset: ImageDataset) -> np.ndarray:
        return np.array(cached(clip, dataset, tmp_path, [augmented(clip, dataset, 1, 0.5)])[0])

    first = crops(contents((1, 2, 3)))
    assert np.array_equal(crops(contents((1, 9, 3)))[[0, 2]], first[[0, 2]])
    assert sum(clip.batches) == 4
    crops(contents((2, 1, 3)))
    assert sum(clip.batches) == 6


def test_one_pass_fills_all_columns_and_opens_each_image_once(tmp_path: Path) -> None:
    clip, opened = FakeClip(), []

    def open_image(index: int) -> Image.Image:
        opened.append(index)
        return DATASET.open_image(index)

    dataset = replace(DATASET, open_image=open_image)
    mean = plain(clip, dataset)
    double = replace(mean, view="double", encode=lambda x: 2 * clip.encode_images(x))
    some = np.array([5, 2, 3])
    cached(clip, dataset, tmp_path, [mean], index_R=some)
    assert sorted(opened) == [2, 3, 5]
    opened.clear()
    clip.batches.clear()
    one, two = cached(clip, dataset, tmp_path, [mean, double])
    assert sorted(opened) == list(range(8))
    assert sum(clip.batches) == 5 + 8
    assert np.array_equal(one, uncached(FakeClip()))
    assert np.array_equal(two, 2 * uncached(FakeClip()))


class Killed(BaseException):
    """Stands for a kill: nothing in the program catches it."""


class MortalClip(FakeClip):
    """Dies in a batch."""

    def __init__(self, last: int, **options: Any) -> None:
        super().__init__(**options)
        self.last = last

    def encode_images(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        if len(self.batches) == self.last:
            raise Killed
        return super().encode_images(images_BCHW)


@pytest.mark.parametrize("torn", [None, "index", "rows", "both"])
def test_an_interrupted_pass_goes_on_where_it_was(tmp_path: Path, torn: str | None) -> None:
    dataset = contents(range(20))
    with pytest.raises(Killed):
        plain_features(MortalClip(5), dataset, tmp_path)
    for suffix in {None: (), "both": ("index", "rows")}.get(torn, (torn,)):
        (path,) = tmp_path.rglob(f"*.{suffix}")
        # The kill fell into a write: part of a group, or rows that no group names.
        with path.open("ab") as file:
            file.write(b"\x03\x00\x00\x00abcdefg" if suffix == "index" else b"\x01" * 40)
    clip = FakeClip()
    assert np.array_equal(plain_features(clip, dataset, tmp_path), uncached(FakeClip(), dataset))
    assert clip.batches == [3, 2], "and its batches are those of a pass that is not interrupted"
    assert np.array_equal(
        plain_features(MortalClip(0), dataset, tmp_path), uncached(FakeClip(), dataset)
    )


def test_a_group_that_reached_the_disk_before_its_rows_is_not_trusted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = contents(range(20))
    with pytest.raises(Killed):
        plain_features(MortalClip(5), dataset, tmp_path)
    (path,) = tmp_path.rglob("*.rows")
    whole = path.read_bytes()
    path.write_bytes(whole[: 13 * 16] + bytes(16) + whole[14 * 16 :])
    clip = FakeClip()
    assert np.array_equal(plain_features(clip, dataset, tmp_path), uncached(FakeClip(), dataset))
    assert sum(clip.batches) == 6
    assert "is damaged" in caplog.text
    assert files(tmp_path) == ["1.index", "1.rows"]


@pytest.mark.parametrize("damage", ["truncated", "empty", "middle", "no rows", "short rows"])
def test_a_damaged_file_is_computed_again(damage: str, tmp_path: Path) -> None:
    plain_features(FakeClip(), DATASET, tmp_path)
    (index,) = tmp_path.rglob("*.index")
    whole = index.read_bytes()
    rows = index.with_suffix(".rows")
    if damage == "no rows":
        rows.unlink()
    elif damage == "short rows":
        rows.write_bytes(rows.read_bytes()[:100])
    else:
        middle = whole[:80] + b"?" + whole[81:]
        index.write_bytes({"truncated": whole[:-20], "empty": b"", "middle": middle}[damage])
    for lost in (True, False):
        clip = FakeClip()
        found = plain_features(clip, DATASET, tmp_path)
        assert np.array_equal(found, uncached(FakeClip()))
        assert bool(clip.batches) == lost
    assert len(files(tmp_path)) == 2


def test_a_row_is_verified_when_it_is_read_and_others_are_not(tmp_path: Path) -> None:
    expected = np.array(plain_features(FakeClip(), DATASET, tmp_path))
    (path,) = tmp_path.rglob("*.rows")
    damaged = bytearray(path.read_bytes())
    damaged[5 * 16 + 3] ^= 4
    path.write_bytes(damaged)
    rows = plain_features(FakeClip(), DATASET, tmp_path)
    assert np.array_equal(rows[np.array([6, 0, -8])], expected[[6, 0, 0]])
    for index in (np.array([5]), slice(3, 6), 5, -3):
        with pytest.raises(DamagedFile, match=rf"{path.name} is damaged in row 5; remove this"):
            rows[index]


def test_superseded_rows_are_removed(tmp_path: Path) -> None:
    def size() -> int:
        return sum(p.stat().st_size for p in tmp_path.rglob("*.rows"))

    def key(colour: int) -> str:
        return digest(str(colour))

    clip = FakeClip()
    plain_features(clip, contents(range(10)), tmp_path)
    plain_features(clip, contents(range(100, 104), "elsewhere"), tmp_path)
    assert size() == 14 * 16
    # Four images of ten remain, and one is new; three more still lie there but are not asked for.
    now = contents([*range(4), 50], retained=(key(7), key(8), key(9)))
    assert np.array_equal(plain_features(clip, now, tmp_path), uncached(FakeClip(), now))
    assert size() == 15 * 16, "more than half is in use"
    now = contents([*range(4), 51])
    rows = plain_features(clip, now, tmp_path)
    assert np.array_equal(rows, uncached(FakeClip(), now))
    assert size() == (5 + 4) * 16, "and nothing of another place was touched"
    clip.batches.clear()
    plain_features(clip, contents(range(100, 104), "elsewhere"), tmp_path)
    assert clip.batches == []


def test_files_that_nobody_uses_are_removed_and_others_are_not(tmp_path: Path) -> None:
    plain_features(FakeClip(), contents([1]), tmp_path)
    plain_features(FakeClip(), contents([2], "in use"), tmp_path)
    (first,) = (tmp_path / "features").iterdir().__next__().parent.glob("center-*")
    former = tmp_path / "features" / digest("x") / f"center-{digest('y')}.npy"
    former.parent.mkdir()
    former.write_bytes(b"")
    mine = first / "notes.index"
    mine.write_text("mine")
    long_ago = time.time() - 200 * 24 * 3600
    for path in (*first.iterdir(), former):
        os.utime(path, (long_ago, long_ago))
    plain_features(FakeClip(), contents([2], "in use"), tmp_path)  # notes the use
    plain_features(FakeClip(), contents([3], "new"), tmp_path)
    owners = {path.name.split("-")[0] for path in first.iterdir()}
    assert owners == {"notes.index", digest("in use"), digest("new")}
    assert not former.exists()


def test_an_earlier_layout_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    former = tmp_path / "features" / digest(DATASET.fingerprint) / "center-0.npy"
    former.parent.mkdir(parents=True)
    former.write_bytes(b"rows")
    for _ in range(2):
        plain_features(FakeClip(), DATASET, tmp_path)
    assert caplog.text.count("earlier version") == 1
    assert former.read_bytes() == b"rows"


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
    """Stops for good in its third batch."""

    def __init__(self, reached: Any) -> None:
        super().__init__()
        self.reached = reached

    def encode_images(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        if len(self.batches) == 2:
            self.reached.set()
            time.sleep(600)
        return super().encode_images(images_BCHW)


def hang(reached: Any, cache_dir: Path) -> None:
    plain_features(HangingClip(reached), DATASET, cache_dir)


def test_a_process_that_is_killed_loses_no_batch(tmp_path: Path) -> None:
    reached = fork.Event()
    process = fork.Process(target=hang, args=(reached, tmp_path))
    process.start()
    assert reached.wait(timeout=60)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(timeout=60)
    clip = FakeClip()
    assert np.array_equal(plain_features(clip, DATASET, tmp_path), uncached(FakeClip()))
    assert clip.batches == [2]


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
    assert files(tmp_path) == []
    assert plain_features(FakeClip(), DATASET, tmp_path).shape == (8, 4)


def test_features_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    clip = FakeClip()
    clip.projection[0, 0] = float("nan")
    with pytest.raises(UserError, match="images 0 to 2 are not finite"):
        plain_features(clip, DATASET, tmp_path)
    assert files(tmp_path) == []


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
