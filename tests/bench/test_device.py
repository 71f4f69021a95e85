"""The benchmarks' cases mix no devices; the device is simulated."""

from __future__ import annotations

import pytest

from fedprompt.bench.backbones import random_images
from fedprompt.bench.compare import max_rel_diff
from fedprompt.bench.limit import Replay, record
from fedprompt.bench.step import StepCase
from tests.support.device_lives import clip_on
from tests.support.simulated_device import DEVICE, SimulatedDevice, why_unavailable


@pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
def test_a_step_its_reference_and_its_products_run_on_a_device() -> None:
    with SimulatedDevice() as device:
        clip = clip_on(DEVICE)
        case = StepCase(clip, 3, 2, 4, random_images(clip, 8, seed=0))
        ours, theirs = case.our_step(2), case.reference_step(0)
        assert max_rel_diff({n: v[0] for n, v in ours.items()}, theirs) < 1e-4
        ours, theirs = case.our_text(1), case.reference_text(0)
        assert max_rel_diff({n: v[0] for n, v in ours.items()}, theirs) < 1e-4
        products = record(lambda: case.our_text(1))
        device.reset()
        Replay(products)()
        assert device.launches.total() >= len(products) > 0
