"""Batches of images come to the device one ahead, and the cache gets the same features."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fedprompt.bench.encode import EncodeOptions, bench_encode
from fedprompt.bench.output import Output
from fedprompt.data.features.cache import cached
from fedprompt.data.features.encoding import plain
from fedprompt.data.features.staging import staged
from tests.support.builders import fake_dataset
from tests.support.device_lives import clip_on
from tests.support.simulated_device import DEVICE, SimulatedDevice, why_unavailable

on_a_device = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))


def _counted(taken: list[int]) -> Iterator[Tensor]:
    for number in range(3):
        taken.append(number)
        yield torch.full((2, 3, 4, 4), float(number))


def test_a_cpu_takes_nothing_ahead_and_copies_nothing() -> None:
    taken: list[int] = []
    for number, batch in enumerate(staged(_counted(taken), torch.device("cpu"))):
        assert taken == list(range(number + 1))
        assert batch.there_BCHW is batch.here_BCHW


@on_a_device
def test_a_device_gets_each_batch_while_it_encodes_the_one_before() -> None:
    taken: list[int] = []
    with SimulatedDevice() as device:
        for number, batch in enumerate(staged(_counted(taken), torch.device(DEVICE))):
            assert len(taken) == device.uploads.total() == min(number + 2, 3)
            assert batch.there_BCHW.device.type == DEVICE
            assert torch.equal(batch.there_BCHW.cpu(), batch.here_BCHW)


@on_a_device
def test_the_cache_is_filled_on_a_device_with_one_copy_a_batch(tmp_path: Path) -> None:
    dataset, on_cpu = fake_dataset(10), clip_on("cpu")
    (expected,) = cached(on_cpu, dataset, tmp_path / "cpu", [plain(on_cpu, dataset)])
    with SimulatedDevice() as device:
        clip = clip_on(DEVICE)
        clip.image_batch = 4
        device.reset()
        (rows,) = cached(clip, dataset, tmp_path / "device", [plain(clip, dataset)])
        assert device.uploads.total() == device.downloads.total() == 3
    index = np.arange(10)
    np.testing.assert_allclose(np.asarray(rows[index]), np.asarray(expected[index]), rtol=1e-4)


def test_the_benchmark_measures_every_part() -> None:
    out = Output("encode")
    bench_encode(clip_on("cpu"), EncodeOptions(images=3, size=32, repeats=1), out)
    (row,) = out.rows
    for part in ("decoded", "tower", "encoded", "cached"):
        assert row[f"{part}_per_s"] > 0
