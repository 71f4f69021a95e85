"""The simulated device itself: it refuses what CUDA refuses, and allows and counts the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.simulated_device import (
    DEVICE,
    DeviceMismatchError,
    DeviceTensor,
    SimulatedDevice,
    why_unavailable,
)

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))

MIXTURES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "a sum": lambda here, there: here + there,
    "a sum in place": lambda here, there: there.add_(here),
    "a sum in place on the CPU": lambda here, there: here.add_(there),
    "a product": lambda here, there: there @ here.T,
    "a linear layer": lambda here, there: F.linear(there, here),
    "addmm": lambda here, there: torch.addmm(here[:, :3], there, there.T),
    "a batch of products": lambda here, there: torch.bmm(here[None], there.T[None]),
    "einsum": lambda here, there: torch.einsum("ij,kj->ik", here, there),
    "a concatenation": lambda here, there: torch.cat([here, there]),
    "a stack": lambda here, there: torch.stack([there, here]),
    "where": lambda here, there: torch.where(there > 0, there, here),
    "where, by a mask of the CPU": lambda here, there: torch.where(here > 0, there, there),
    "a comparison": lambda here, there: there == here,
    "equal": torch.equal,
    "gather": lambda here, there: there.gather(0, here.long()),
    "scatter": lambda here, there: there.scatter(0, here.long(), there),
    "index_select": lambda here, there: there.index_select(0, here.long()[0]),
    "an index of the device into the CPU": lambda here, there: here[there.long()],
    "a mask of the device into the CPU": lambda here, there: here[there > 0],
    "a write of values of the CPU": lambda here, there: there.index_put(
        (here.long(),), here[:, None]
    ),
    "an embedding": lambda here, there: F.embedding(here.long(), there),
    "a layer norm": lambda here, there: F.layer_norm(there, (4,), here[0], here[0]),
    "a cross-entropy": lambda here, there: F.cross_entropy(there, here.long()[:, 0]),
    "a sum of many": lambda here, there: torch._foreach_add([there, there], [here, there]),
    "a matrix product with a number": lambda here, there: torch.mm(there, here.sum().reshape(1, 1)),
}
LEGAL: dict[str, Callable[[Tensor, Tensor, str], object]] = {
    "a Python number": lambda here, there, on: there * 2 + 1,
    "a single number of the CPU": lambda here, there, on: there * here.sum(),
    "a single number of the CPU in where": lambda here, there, on: there.where(
        there > 0, here.sum()
    ),
    "an index of the CPU": lambda here, there, on: there[here.long()[:, 0]],
    "a write at an index of the CPU": lambda here, there, on: there.index_put(
        (here.long()[0],), there[0]
    ),
    "to": lambda here, there, on: here.to(on) + there,
    "to, as another type": lambda here, there, on: here.to(on, torch.float64) + there,
    "cpu": lambda here, there, on: here + there.cpu(),
    "copy_ to the device": lambda here, there, on: there.copy_(here),
    "copy_ to the CPU": lambda here, there, on: here.copy_(there),
    "a new tensor": lambda here, there, on: torch.tensor([1.0], device=on) + there,
    "new zeros": lambda here, there, on: torch.zeros(4, device=on) + there,
    "zeros of the CPU": lambda here, there, on: there.new_zeros(4, device="cpu") + here,
    "item": lambda here, there, on: there.sum().item(),
    "attention": lambda here, there, on: F.scaled_dot_product_attention(*[there[None, None]] * 3),
    "a view": lambda here, there, on: there.T.flatten()[1:].unflatten(0, (-1, 1)),
}


@pytest.fixture
def device() -> Iterator[SimulatedDevice]:
    with SimulatedDevice() as simulated:
        yield simulated


def _pair() -> tuple[Tensor, Tensor]:
    here = torch.arange(12.0).reshape(3, 4) % 3
    return here, here.to(DEVICE)


@pytest.mark.parametrize("case", MIXTURES)
def test_a_mixture_is_refused(case: str, device: SimulatedDevice) -> None:
    with pytest.raises(DeviceMismatchError):
        MIXTURES[case](*_pair())


@pytest.mark.parametrize("case", LEGAL)
def test_a_legal_use_is_allowed_and_computes_what_the_cpu_does(
    case: str, device: SimulatedDevice
) -> None:
    here, there = _pair()
    ours = LEGAL[case](here, there, DEVICE)
    if isinstance(ours, DeviceTensor):
        ours = ours.cpu()
    here = _pair()[0]
    expected = LEGAL[case](here, here.clone(), "cpu")
    assert torch.equal(torch.as_tensor(ours), torch.as_tensor(expected))


def test_values_cannot_leave_without_a_copy(device: SimulatedDevice) -> None:
    there = _pair()[1]
    with pytest.raises((RuntimeError, TypeError)):
        there.numpy()
    assert there.device.type == DEVICE
    assert there.tolist() == there.cpu().tolist()


def test_gradients_stay_on_the_device_and_equal_those_of_the_cpu(device: SimulatedDevice) -> None:
    here, there = (t.requires_grad_() for t in _pair())
    for x in (here, there):
        F.layer_norm(x @ x.T, (3,)).square().sum().backward()
    assert isinstance(there.grad, DeviceTensor)
    assert torch.equal(there.grad.cpu(), here.grad)  # type: ignore[arg-type]


def test_launches_copies_and_waits_are_counted(device: SimulatedDevice) -> None:
    here, there = _pair()
    assert device.uploads.total() == 1
    total = (there.T @ there).sum()
    assert device.launches == {"mm": 1, "sum": 1}, "a view starts no kernel"
    assert not device.waits
    float(total)
    assert device.waits.total() == 1
    there[there > 0]
    assert device.waits.total() == 2, "the size of the result is waited for"
    torch.where(there > 0, there, 0.0)
    assert device.waits.total() == 2
    there.cpu()
    assert (device.waits.total(), device.downloads.total()) == (3, 1)
    there[here.long()[:, 0]]
    assert device.uploads.total() == 2, "an index is copied over"
    device.reset()
    assert not device.launches + device.uploads + device.downloads + device.waits


def test_memory_is_counted_by_storage_and_ends() -> None:
    number = 4
    with SimulatedDevice(memory_bytes=100 * number) as device:
        first = torch.zeros(60, device=DEVICE)
        part = first[:10]
        assert (device.memory.used, device.memory.free) == (60 * number, 40 * number)
        with pytest.raises(torch.OutOfMemoryError):
            torch.zeros(60, device=DEVICE)
        assert device.memory.refused == 1
        del first
        assert device.memory.used == 60 * number, "a view keeps its whole storage"
        del part
        assert device.memory.used == 0
        torch.zeros(100, device=DEVICE)
        assert device.memory.peak == 100 * number
        device.memory.reset_peak()
        assert device.memory.peak == 0


def test_a_tensor_is_of_no_use_without_its_device(device: SimulatedDevice) -> None:
    there = _pair()[1]
    device.__exit__(None, None, None)
    try:
        with pytest.raises(RuntimeError):
            there + 1
    finally:
        device.__enter__()
