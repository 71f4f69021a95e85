"""A simulated accelerator, so that tests of device code need no GPU.

    with SimulatedDevice() as device:
        clip = FrozenCLIP(model, tokenizer, ..., device=DEVICE)
        ...
    device.launches.total(), device.uploads, device.downloads, device.waits

Tensors on the simulated device compute on the CPU, with the CPU's values. What differs is what
matters to device code:

- An operation that mixes the device's tensors with the CPU's raises `DeviceMismatchError`, where
  CUDA would raise "Expected all tensors to be on the same device".
- Kernel launches, copies in both directions, and waits of the host for the device are counted,
  copies and waits by the line of the project that caused them.
- With `memory_bytes`, an allocation that does not fit raises `torch.OutOfMemoryError`. Memory is
  free again as soon as the last tensor of a storage is gone, as with an allocator without a cache.

How it works: PyTorch reserves the dispatch key PrivateUse1 for devices that it does not know. It is
registered here as a backend written in Python, which gives the device a guard, a device count and a
thread for its backward passes. A wrapper subclass claims to be on the device and holds a CPU
tensor; a dispatch mode sees every operation, checks and counts it, and runs it on what is held.

It cannot show timing, reduced precision, unordered sums, or the limits of real kernels. Some names
of PyTorch that it uses are private; `why_unavailable` says which of them are missing.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

import fedprompt

DEVICE = "simulated"
"""The device's name, as in `tensor.to(DEVICE)`."""

_PACKAGE = str(Path(fedprompt.__file__).parent)

_WAITING = {
    "_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "unique_dim",
    "unique_consecutive", "repeat_interleave", "is_nonzero", "allclose", "isclose",
}  # fmt: skip
"""Operations whose result, or its shape, the host needs before it can go on."""
_WITHOUT_KERNEL = {
    "detach", "detach_", "alias", "view", "view_as", "_unsafe_view", "_reshape_alias", "t",
    "transpose", "transpose_", "permute", "movedim", "expand", "slice", "select", "narrow",
    "unsqueeze", "unsqueeze_", "squeeze", "squeeze_", "split", "split_with_sizes", "chunk",
    "unbind", "as_strided", "unfold", "diagonal", "empty", "empty_like", "empty_strided",
    "new_empty", "new_empty_strided", "lift_fresh", "resize_", "set_", "is_same_size",
    "_has_same_storage_numel", "_fused_sdp_choice",
}  # fmt: skip
"""Operations that change a tensor's description only, or reserve memory without writing to it."""
_STRICT = {
    "cat", "stack", "gather", "scatter", "scatter_", "scatter_add", "scatter_add_", "index_add",
    "index_add_", "index_select", "embedding", "dot", "mv", "mm", "bmm", "addmm", "baddbmm",
    "native_layer_norm", "convolution",
}  # fmt: skip
"""Operations that refuse even a single number on the CPU; elementwise ones accept it."""
_INDEXED = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}
"""Operations that accept indices on the CPU and copy them to the device."""


class DeviceMismatchError(RuntimeError):
    """An operation was given tensors of the device and tensors of the CPU."""


def why_unavailable() -> str | None:
    """Why this PyTorch cannot simulate a device; None if it can."""
    missing = [
        name
        for name in ("_only_lift_cpu_tensors", "_set_only_lift_cpu_tensors")
        if not hasattr(torch._C, name)
    ]
    try:
        from torch.utils.backend_registration import (  # noqa: F401
            _setup_privateuseone_for_python_backend,
        )
    except ImportError:
        missing.append("_setup_privateuseone_for_python_backend")
    if not hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"):
        missing.append("_scaled_dot_product_flash_attention_for_cpu")
    if missing:
        return f"PyTorch {torch.__version__} has no {', '.join(missing)}"
    return None


class _Backend:
    """The module `torch.simulated`: what PyTorch itself asks a backend for."""

    _initialized = True

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def _lazy_init(self) -> None: ...

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def device(self, index: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    # The project draws with NumPy, so the generators of the device are never used.
    def manual_seed_all(self, seed: int) -> None: ...

    def get_rng_state(self, device: Any = 0) -> Tensor:
        return torch.zeros(1, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device: Any = 0) -> None: ...


_registered: list[torch.library.Library] = []


def register() -> None:
    """Register the backend; a process can do so once, before its first backward pass.

    The first backward pass counts the devices and starts a thread for each.
    """
    if _registered:
        return
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(DEVICE, backend_module=_Backend())
    # Autocast has no rules for an unknown device and would stop; it is told to do nothing.
    library = torch.library.Library("_", "IMPL")
    library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    _registered.append(library)


class Memory:
    """The device's memory, in bytes of all storages that a tensor of the device still uses.

    Attributes:
        limit: bytes of the device; None if there is no limit.
        used: bytes in use.
        peak: the most that `used` has been since the last `reset_peak`.
        refused: how many allocations did not fit.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.used = self.peak = self.refused = 0
        self._users: Counter[int] = Counter()
        # Finalisers run in whichever thread drops the last reference, also in a backward pass's.
        self._lock = threading.RLock()

    @property
    def free(self) -> int:
        """Bytes that are not in use.

        Raises:
            ValueError: the device has no limit.
        """
        if self.limit is None:
            raise ValueError("a device without memory_bytes has no free memory")
        return self.limit - self.used

    def reset_peak(self) -> None:
        self.peak = self.used

    def track(self, tensor: Tensor, held: Tensor) -> None:
        """Count the storage of `held` for as long as `tensor` exists.

        Raises:
            torch.OutOfMemoryError: the storage is new and does not fit.
        """
        storage = held.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        with self._lock:
            if not self._users[address]:
                if self.limit is not None and self.used + size > self.limit:
                    self.refused += 1
                    raise torch.OutOfMemoryError(
                        f"out of memory on the simulated device: {size} bytes do not fit beside "
                        f"{self.used} of {self.limit}"
                    )
                self.used += size
                self.peak = max(self.peak, self.used)
            self._users[address] += 1
        weakref.finalize(tensor, self._release, address, size)

    def _release(self, address: int, size: int) -> None:
        with self._lock:
            self._users[address] -= 1
            if not self._users[address]:
                del self._users[address]
                self.used -= size


_active: list[SimulatedDevice] = []


class DeviceTensor(Tensor):
    """A tensor that claims to be on the simulated device; `held` has its values."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Tensor) -> DeviceTensor:
        tensor: DeviceTensor = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(DEVICE, 0),
        )
        tensor.held = held
        if _active:
            _active[-1].memory.track(tensor, held)
        return tensor

    def tolist(self) -> Any:
        """The values, after a wait; PyTorch's own `tolist` does not accept subclasses."""
        return self.cpu().tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"DeviceTensor({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on a tensor of the simulated device, which is not in use")


class SimulatedDevice(TorchDispatchMode):
    """The device, usable inside its `with` block.

    Args:
        memory_bytes: the size of its memory; unlimited by default.
        lines_of_launches: count launches by operation and line, not by operation alone. It is
            slower.

    Attributes:
        launches: kernels started, by operation.
        uploads: copies from the host to the device, by line.
        downloads: copies from the device to the host, by line. Each of them is also a wait.
        waits: how often the host waited for the device, by operation and line.
        memory: its memory.
    """

    def __init__(self, memory_bytes: int | None = None, *, lines_of_launches: bool = False) -> None:
        register()
        super().__init__()
        self.memory = Memory(memory_bytes)
        self.lines_of_launches = lines_of_launches
        self.launches: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()
        self.downloads: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __enter__(self) -> SimulatedDevice:
        self._resources = contextlib.ExitStack()
        self._resources.enter_context(_every_new_tensor_is_seen())
        self._resources.enter_context(_one_kernel_per_attention())
        _active.append(self)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _active.remove(self)
        self._resources.close()

    def reset(self) -> None:
        """Set all counts to zero."""
        for counts in (self.launches, self.uploads, self.downloads, self.waits):
            counts.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name.removeprefix("aten::")
        if name == "_to_copy":
            return self._copied(func, args[0], kwargs)
        if name in ("copy_", "_copy_from"):
            return self._written(func, args, kwargs)
        tensors = _tensors((args, tuple(kwargs.values())))
        on_device = [t for t in tensors if isinstance(t, DeviceTensor)]
        target = kwargs.get("device")
        if not on_device and not _is_simulated(target):
            return func(*args, **kwargs)
        self._check(func, name, args, tensors)
        if name in _WAITING or _selects_by_mask(name, args):
            self.waits[f"{name} at {_line()}"] += 1
        if name not in _WITHOUT_KERNEL:
            where = f" at {_line()}" if self.lines_of_launches else ""
            self.launches[name + where] += 1
        if _is_simulated(target):
            kwargs["device"] = torch.device("cpu")
            kwargs.pop("pin_memory", None)
        result = func(*_held(args), **{n: _held(value) for n, value in kwargs.items()})
        if target is not None and not _is_simulated(target):
            return result  # such as `new_zeros(..., device="cpu")`
        wrapped = _on_device(result)
        # Views and operations in place: autograd must see the tensors that it was given.
        aliases = on_device and _returns_an_argument(func)
        return return_and_correct_aliasing(func, args, kwargs, wrapped) if aliases else wrapped

    def _check(self, func: Any, name: str, args: Any, tensors: list[Tensor]) -> None:
        """Refuse tensors of the CPU beside the device's, unless CUDA accepts them too."""
        foreign = [
            t
            for t in tensors
            if not isinstance(t, DeviceTensor) and (t.dim() > 0 or name in _STRICT)
        ]
        if not foreign:
            return
        if name in _INDEXED and isinstance(args[0], DeviceTensor):
            indices = [t for t in args[1] if t is not None]
            if all(any(t is i for i in indices) for t in foreign):
                # From ordinary memory, so that the host waits until they have arrived.
                self.uploads[_line()] += len(foreign)
                return
        described = ", ".join(f"{list(t.shape)} on {t.device.type}" for t in tensors)
        raise DeviceMismatchError(f"{func} of tensors {described} at {_line()}")

    def _copied(self, func: Any, source: Tensor, kwargs: dict[str, Any]) -> Any:
        """`Tensor.to`: the one way by which values legally change their device."""
        target = kwargs.pop("device", None)
        from_device = isinstance(source, DeviceTensor)
        to_device = from_device if target is None else _is_simulated(target)
        if not from_device and not to_device:
            return func(source, **kwargs, device=target)
        kwargs.pop("pin_memory", None)
        copy = func(_held(source), **kwargs)
        if copy.data_ptr() == _held(source).data_ptr():
            copy = copy.clone()
        self._count_copy(from_device, to_device)
        return DeviceTensor(copy) if to_device else copy

    def _written(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """`Tensor.copy_`, which accepts both devices on both sides."""
        target, source = args[:2]
        self._count_copy(isinstance(source, DeviceTensor), isinstance(target, DeviceTensor))
        func(*_held(args), **kwargs)
        return target

    def _count_copy(self, from_device: bool, to_device: bool) -> None:
        if from_device and to_device:
            self.launches["copy" + (f" at {_line()}" if self.lines_of_launches else "")] += 1
        elif to_device:
            self.uploads[_line()] += 1
        elif from_device:
            self.downloads[_line()] += 1
            self.waits[f"copy at {_line()}"] += 1


def _is_simulated(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE


# Arguments and results are tensors, or lists and tuples of them; PyTorch's own functions for trees
# of any kind would take most of the time here.


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [t for item in value for t in _tensors(item)]
    return []


def _on_device(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value if isinstance(value, DeviceTensor) else DeviceTensor(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_on_device(item) for item in value)
    return value


def _held(value: Any) -> Any:
    if isinstance(value, DeviceTensor):
        return value.held
    if isinstance(value, (list, tuple)):
        return type(value)(_held(item) for item in value)
    return value


@cache
def _returns_an_argument(func: Any) -> bool:
    return any(r.alias_info is not None for r in func._schema.returns)


def _selects_by_mask(name: str, args: Any) -> bool:
    """Whether an indexing reads by a mask: the number of its results must be known first."""
    return name in ("index", "_unsafe_index") and any(
        t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]
    )


def _line() -> str:
    """The innermost line of the package that is running, such as `training.py:120`.

    Backward passes run in a thread of their own, where only hand-written ones have a line.
    """
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(_PACKAGE):
            return f"{path[len(_PACKAGE) + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "?"


@contextlib.contextmanager
def _every_new_tensor_is_seen() -> Iterator[None]:
    """Let `torch.tensor(..., device=DEVICE)` pass through the dispatch mode.

    Otherwise PyTorch asks the backend directly for memory, and there is none.
    """
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


@contextlib.contextmanager
def _one_kernel_per_attention() -> Iterator[None]:
    """Run fused attention as on CUDA: one kernel that stores no matrix of scores."""
    usual = F.scaled_dot_product_attention

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        on_device = all(isinstance(t, DeviceTensor) for t in (query, key, value))
        if not on_device or query.dim() != 4 or dropout_p or enable_gqa:
            return usual(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale,
                enable_gqa=enable_gqa,
            )  # fmt: skip
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(
                ~attn_mask, -torch.inf
            )
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        result: Tensor = fused(
            query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )[0]
        return result

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = usual
