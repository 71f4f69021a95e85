"""How close a training step comes to the speed of its matrix products alone.

The shapes of all matrix products of a real step are recorded. Then only these run again, on
preallocated tensors and in the same order. Operands that were at one address in the real step share
a tensor in the replay, so that the processor's caches are as warm or cold as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.bench.backbones import random_images
from fedprompt.bench.compare import interleave, max_rel_diff, require_equal, row
from fedprompt.bench.counting import count_gflop
from fedprompt.bench.output import TIMES, Column, Output
from fedprompt.bench.step import CHECKED, StepCase
from fedprompt.runtime import cards

aten = torch.ops.aten
PRODUCTS: dict[Any, Callable[..., Any]] = {
    aten.mm: torch.mm,
    aten.addmm: torch.addmm,
    aten.bmm: torch.bmm,
    aten.baddbmm: torch.baddbmm,
}
COLUMNS: tuple[Column, ...] = (
    ("case", "case", ""),
    ("real s", "ours_s", ".4g"),
    ("bare s", "reference_s", ".4g"),
    ("share of limit", "share_of_limit", ".0%"),
    ("products", "products", "d"),
    ("GFLOP", "products_gflop", ".1f"),
    ("other GFLOP", "other_gflop", ".2f"),
    ("bare GFLOP/s", "bare_gflop_per_s", ".0f"),
    *TIMES[5:],
)
TOP = 12


@dataclass(frozen=True)
class _Operand:
    """A tensor of the real step: its address and its layout."""

    address: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> _Operand:
        layout = tuple(tensor.shape), tuple(tensor.stride())
        return cls(tensor.data_ptr(), *layout, tensor.dtype, tensor.device)

    def allocate(self) -> Tensor:
        """A new tensor of this layout, with small values; a stride of 0 repeats elements."""
        span = 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        return (
            torch.empty(span, dtype=self.dtype, device=self.device)
            .normal_(std=0.02)
            .as_strided(self.shape, self.stride)
        )


@dataclass(frozen=True)
class Product:
    """One recorded matrix product: its function, inputs, output and keyword arguments."""

    function: Callable[..., Any]
    inputs: tuple[_Operand, ...]
    output: _Operand
    options: tuple[tuple[str, Any], ...] = ()


class Recorder(TorchDispatchMode):
    """Records every matrix product that runs while it is active."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products: list[Product] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        function = PRODUCTS.get(func.overloadpacket)
        if function is not None:
            # Recorded after the call, when the address of the result is known.
            tensors = [a for a in args if isinstance(a, Tensor)]
            options = {k: v for k, v in (kwargs or {}).items() if k in ("alpha", "beta")}
            self.products.append(
                Product(
                    function,
                    tuple(_Operand.of(t) for t in tensors),
                    _Operand.of(result),
                    tuple(options.items()),
                )
            )
        return result


def record(call: Callable[[], Any]) -> list[Product]:
    """The matrix products of one call, its backward passes included."""
    recorder = Recorder()
    with recorder:
        call()
    return recorder.products


class Replay:
    """The recorded products alone, with every tensor allocated beforehand."""

    def __init__(self, products: Sequence[Product]) -> None:
        made: dict[_Operand, Tensor] = {}

        def tensor(operand: _Operand) -> Tensor:
            if operand not in made:
                made[operand] = operand.allocate()
            return made[operand]

        # An output may reuse the address of an input, but a product must not overwrite its input.
        self._calls = []
        for p in products:
            inputs = [tensor(o) for o in p.inputs]
            out = tensor(p.output) if p.output not in p.inputs else p.output.allocate()
            self._calls.append((p.function, inputs, {**dict(p.options), "out": out}))

    @torch.no_grad()
    def __call__(self) -> None:
        """Run all of them once."""
        for function, inputs, options in self._calls:
            function(*inputs, **options)


def bench_limit(
    clip: FrozenCLIP,
    classes: Sequence[int],
    context: int,
    batch: int,
    repeats: int,
    out: Output,
    *,
    profile: bool = False,
) -> None:
    """Measure the real step and its matrix products alone, in turn.

    Args:
        clip: the frozen backbone.
        classes: numbers of classes, one case each.
        context: number of context tokens.
        batch: images of a client.
        repeats: number of repeats.
        out: where rows and notes go.
        profile: also print which operations take the time.

    Raises:
        MismatchError: the real step's loss or gradient differs from the reference's.
    """
    images_N3HW = random_images(clip, CHECKED * batch, seed=0)
    for number in classes:
        out.progress(f"{number} classes")
        name = f"limit C={number} M={context}"
        case = StepCase(clip, number, context, batch, images_N3HW)

        def real(case: StepCase = case) -> dict[str, Tensor]:
            return case.our_step(case.clients)

        first = {n: v[0] for n, v in real().items()}
        difference = max_rel_diff(first, case.reference_step(0))
        require_equal(name, difference)
        products = record(real)
        replay = Replay(products)
        # A warm-up, which also shows that every recorded product can be replayed.
        replay()
        measured = interleave(
            {"real": lambda _: real(), "bare": lambda _: replay()},  # noqa: B023
            repeats=repeats,
            warm_up=("real",),
        )
        bare_gflop, all_gflop = count_gflop(replay), count_gflop(real)
        line = row(name, measured["real"], measured["bare"], difference=difference)
        out.add(
            line
            | {
                "clients": case.clients,
                "share_of_limit": measured["bare"].best / measured["real"].best,
                "products": len(products),
                "products_gflop": bare_gflop,
                "other_gflop": all_gflop - bare_gflop,
                "bare_gflop_per_s": bare_gflop / measured["bare"].best,
            }
        )
        if profile:
            out.note(_profile(real))
    out.table(COLUMNS)


def _profile(call: Callable[[], Any]) -> str:
    """A table of operations, sorted by the time spent in each itself."""
    kinds, column = [torch.profiler.ProfilerActivity.CPU], "self_cpu_time_total"
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        kinds, column = [*kinds, torch.profiler.ProfilerActivity.CUDA], "self_cuda_time_total"
    with torch.profiler.profile(activities=kinds) as seen:
        call()
        cards.wait_for_all()
    return str(seen.key_averages().table(sort_by=column, row_limit=TOP))
