"""Every method on a device: the CPU's numbers, no mixture of devices, and costs within budget."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fedprompt.backbone import text_tower
from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.methods import promptsrc
from fedprompt.methods.base import Batch, Tensors
from fedprompt.methods.parts import prompts
from fedprompt.methods.parts.normalised import in_few_kernels
from fedprompt.methods.promptfl import PromptFL
from fedprompt.methods.promptsrc import imagenet_templates
from fedprompt.methods.registry import all_methods
from tests.device.budgets import COPIES_PER_ROUND, DEEP_STEP, MORE_COPIES, STEP, Budget, exceeded
from tests.support.device_lives import Life, clip_on, live
from tests.support.simulated_device import (
    DEVICE,
    DeviceMismatchError,
    SimulatedDevice,
    why_unavailable,
)

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))


@pytest.fixture(scope="module")
def on_cpu() -> FrozenCLIP:
    return clip_on("cpu")


@pytest.fixture(scope="module")
def on_device() -> FrozenCLIP:
    with SimulatedDevice():
        return clip_on(DEVICE)


FEWER: dict[str, dict[str, int]] = {
    "fedotp": {"max_iterations": 20},
    # Both rounds have noise, and the second repels.
    "rebapl": {"cycles": 10, "exploration": 0},
}
"""Options that spare the test time, or show all of a method in two rounds."""


@pytest.fixture(autouse=True)
def _two_templates(monkeypatch: pytest.MonkeyPatch) -> None:
    """PromptSRC's sixty templates, each a text tower of its own, would take most of the time."""
    monkeypatch.setattr(promptsrc, "imagenet_templates", lambda: imagenet_templates()[:2])


@pytest.fixture
def device() -> Iterator[SimulatedDevice]:
    with SimulatedDevice() as simulated:
        yield simulated


@pytest.mark.parametrize("name", list(all_methods()))
def test_a_method_computes_what_it_does_on_the_cpu_within_its_budget(
    name: str,
    device: SimulatedDevice,
    on_device: FrozenCLIP,
    on_cpu: FrozenCLIP,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = FEWER.get(name, {})
    ours = live(name, on_device, device, **options)
    assert device.launches.total() > 0
    # Tests of their own show that the formulas of devices equal those of CPUs. Here both sides use
    # the same, because momentum and rates of 5 lr amplify float rounding.
    monkeypatch.setattr(text_tower, "prefers_bins", lambda device: True)
    monkeypatch.setattr(prompts, "normalised", in_few_kernels)
    _assert_equal(ours, live(name, on_cpu, **options))
    if ours.steps and name not in STEP:
        launches = max(step.launches.total() for step in ours.steps)
        pytest.skip(f'write it into STEP: "{name}": Budget({-(-launches // 5) * 5})')
    for step in ours.steps:
        assert not exceeded(step, STEP[name])
    for cost in ours.rounds:
        copies = cost.uploads + cost.downloads
        assert copies.total() <= MORE_COPIES.get(name, COPIES_PER_ROUND), copies


def _assert_equal(ours: Life, theirs: Life) -> None:
    assert ours.values.keys() == theirs.values.keys()
    for name, expected in theirs.values.items():
        found = ours.values[name]
        assert type(found) is Tensor, f"{name} is still on the device"
        if not expected.numel():
            assert found.shape == expected.shape, name
            continue
        gap = float((found - expected).abs().max())
        assert gap <= 1e-5 * float(expected.abs().max()) + 1e-7, name


def test_there_is_a_budget_for_every_method_and_for_no_other() -> None:
    without_steps = {"afl", "latte", "tfup", "tip_adapter", "tofa", "zero_shot"}
    assert set(STEP) == set(all_methods()) - without_steps


@pytest.mark.parametrize("name", ["promptfl", "fedrsclip"])
def test_twelve_layers_are_few_launches(name: str, device: SimulatedDevice) -> None:
    deep = clip_on(DEVICE, text_cfg={"width": 32, "heads": 2, "layers": 12})
    assert not exceeded(live(name, deep, device).steps[1], Budget(DEEP_STEP))


class _Reads(PromptFL):
    """PromptFL with a number that the host reads in every step."""

    def loss_terms(
        self, shared: Tensors, private: Tensors, encoded: Tensors, batch: Batch
    ) -> dict[str, Tensor]:
        terms = super().loss_terms(shared, private, encoded, batch)
        return {"ce": terms["ce"] * float(terms["ce"].detach().isfinite().any().item())}


class _Copies(PromptFL):
    """PromptFL with a constant that is copied to the device in every step."""

    def loss_terms(
        self, shared: Tensors, private: Tensors, encoded: Tensors, batch: Batch
    ) -> dict[str, Tensor]:
        terms = super().loss_terms(shared, private, encoded, batch)
        return {"ce": terms["ce"] * torch.ones(1).to(self.clip.device)}


class _Mixes(PromptFL):
    """PromptFL with a constant that stays on the CPU."""

    def loss_terms(
        self, shared: Tensors, private: Tensors, encoded: Tensors, batch: Batch
    ) -> dict[str, Tensor]:
        terms = super().loss_terms(shared, private, encoded, batch)
        return {"ce": terms["ce"] * torch.ones(len(terms["ce"]))}


@pytest.mark.parametrize(("kind", "fault"), [(_Reads, "waits"), (_Copies, "copies")])
def test_a_wait_or_a_copy_in_a_step_exceeds_the_budget(
    kind: type[PromptFL],
    fault: str,
    device: SimulatedDevice,
    on_device: FrozenCLIP,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tests.support.twins.method_class", lambda name: kind)
    budget = STEP["promptfl"]
    generous = Budget(budget.launches + 10, budget.copies, budget.waits)
    faults = exceeded(live("promptfl", on_device, device).steps[1], generous)
    assert [f.partition(":")[0] for f in faults] == [fault]
    assert "local_step.py" in faults[0]


def test_a_tensor_left_on_the_cpu_is_refused(
    device: SimulatedDevice, on_device: FrozenCLIP, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.support.twins.method_class", lambda name: _Mixes)
    with pytest.raises(DeviceMismatchError):
        live("promptfl", on_device, device)


def test_images_and_hand_written_texts_are_encoded_as_on_the_cpu(
    device: SimulatedDevice, on_device: FrozenCLIP, on_cpu: FrozenCLIP
) -> None:
    pictures = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(on_device.encode_images(pictures), on_cpu.encode_images(pictures))
    texts = ["a photo of a river.", "beach"]
    found = on_device.encode_text_raw(texts)
    assert found.device.type == DEVICE
    torch.testing.assert_close(found.cpu(), on_cpu.encode_text_raw(texts))
