"""Copies, draws and pixels of a round: few and early on a device, and the same numbers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fedprompt.data.features import feed as feeds
from fedprompt.data.features.feed import Feed, resident
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.parts import draws
from fedprompt.methods.parts.draws import StepDraws
from fedprompt.methods.parts.remembered import Remembered
from fedprompt.rng import uniform
from fedprompt.runtime import transfer
from fedprompt.runtime.transfer import moved, moved_by_name
from tests.support.builders import batch_of
from tests.support.device_lives import clip_on, images, live
from tests.support.simulated_device import DEVICE, SimulatedDevice, why_unavailable

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
CPU = torch.device("cpu")


@pytest.fixture
def device() -> Iterator[SimulatedDevice]:
    with SimulatedDevice() as simulated:
        yield simulated


def _some() -> dict[str, torch.Tensor]:
    return {
        "numbers": torch.arange(6).view(2, 3),
        "nothing": torch.empty(0, 4),
        "one": torch.tensor(1.5),
        "mask": torch.tensor([True, False, True]),
        "across": torch.arange(6.0).view(2, 3).T,
        "bytes": torch.arange(5, dtype=torch.uint8),
    }


def test_small_tensors_cross_in_one_copy_each_way(device: SimulatedDevice) -> None:
    (there,) = moved_by_name([_some()], torch.device(DEVICE))
    assert device.uploads.total() <= 2, "an empty tensor is no part of the buffer"
    assert all(t.device.type == DEVICE for t in there.values())
    device.reset()
    (back,) = moved_by_name([there], CPU)
    assert device.downloads.total() <= 2
    for name, expected in _some().items():
        assert torch.equal(back[name], expected), name
        assert back[name].dtype == expected.dtype


def test_a_large_tensor_is_not_packed(
    device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "ALONE", 100)
    small, large = torch.ones(3), torch.ones(100)
    moved([small, large, small], torch.device(DEVICE))
    assert device.uploads.total() == 2


def test_what_is_there_stays_as_it_is(device: SimulatedDevice) -> None:
    here, there = torch.ones(2), torch.ones(2).to(DEVICE)
    assert moved([here], CPU)[0] is here
    device.reset()
    assert moved([there, here], torch.device(DEVICE))[0] is there
    assert device.uploads.total() == 1


@pytest.mark.parametrize("at_once", [1, 4 * 3 * 2 * 2, 2**20])
def test_draws_made_ahead_are_those_made_step_by_step(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many steps are drawn at once, and although the second client takes fewer."""
    monkeypatch.setattr(draws, "AT_ONCE", at_once)
    ahead = StepDraws((0, 1), (3, 2), CPU)
    for step in (0, 1, 2, 1):
        plain = batch_of(torch.ones(2, 1, 4), torch.zeros(2, 1, dtype=torch.int64), step=step)
        for_all = ahead.rows(uniform, (3,), 1, ("dropout",), 1, step)
        expected = plain.uniform((3,), "dropout")
        active = 1 if step == 2 else 2
        assert torch.equal(for_all[:active], expected[:active])
    assert not torch.equal(ahead.rows(uniform, (3,), 1, ("other",), 1, 0), for_all)


def test_the_last_answer_is_kept_for_the_same_unchanged_tensors() -> None:
    asked = []
    last = Remembered[int]()

    def ask(tensor: torch.Tensor) -> int:
        return last((tensor,), lambda: asked.append(1) or len(asked))

    one, equal = torch.ones(2), torch.ones(2)
    assert [ask(one), ask(one), ask(equal), ask(equal)] == [1, 1, 2, 2]
    equal += 1
    assert ask(equal) == 3
    assert last((equal, one), lambda: -1) == -1


def test_pixels_that_do_not_fit_are_copied_step_by_step(
    device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = clip_on(DEVICE)
    whole = live("vpt", clip, device)
    assert not whole.steps[0].uploads
    monkeypatch.setattr(feeds, "free_memory", lambda device: 1.0)
    by_step = live("vpt", clip, device)
    assert by_step.steps[0].uploads.total() == 1
    for name, expected in whole.values.items():
        assert torch.equal(by_step.values[name], expected), name


def test_a_feed_gives_the_rows_of_each_step() -> None:
    clip = clip_on("cpu")
    inputs_N, index_SKB = images(clip, 6), torch.tensor([[[0, 5], [3, 2]], [[1, 1], [0, 0]]])
    assert resident(inputs_N, CPU).pixels is inputs_N.pixels
    without = Inputs(inputs_N.features, mean_std=inputs_N.mean_std)
    feed = Feed(without, index_SKB, inputs_N.pixels, index_SKB)
    feed.prefetch(0, 2)
    for step, active in ((0, 2), (1, 1)):
        ours = feed.batch(step, active)
        expected = inputs_N[index_SKB[step, :active]].on(CPU)
        assert torch.equal(ours.features, expected.features)
        assert torch.equal(ours.pixels, expected.pixels)  # type: ignore[arg-type]
        feed.prefetch(step + 1, active)
