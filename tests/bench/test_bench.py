"""The benchmarks: right counts, honest comparisons, and every subcommand on a tiny backbone.

Nothing here asserts a time.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typer.testing import CliRunner

import fedprompt.bench.cli as cli
import fedprompt.bench.round as round_module
from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.bench.class_lists import CIFAR100, LISTS, class_names
from fedprompt.bench.compare import (
    Measured,
    MismatchError,
    interleave,
    max_rel_diff,
    require_equal,
    row,
)
from fedprompt.bench.counting import count_gflop
from fedprompt.bench.flower_engine import available
from fedprompt.bench.isolated import in_fresh_process
from fedprompt.bench.job import Job, Piece, few_shot_job, total
from fedprompt.bench.limit import Replay, record
from fedprompt.bench.machine import peak_mb, private_mb, reset_peak
from fedprompt.bench.memory import MemoryOptions, inline_round, reference_step, write_experiment
from fedprompt.bench.output import Output
from fedprompt.bench.overhead import OverheadOptions, bench_overhead
from fedprompt.bench.reference import ReferenceCoOp
from fedprompt.bench.scale import ScaleOptions, measure
from fedprompt.bench.workload import Sizes, make_workspace, reference_clients
from fedprompt.errors import UserError

KEYS = {"case", "ours_s", "reference_s", "ratio", "max_rel_diff", "peak_mb", "machine"}
linux = pytest.mark.skipif(not Path("/proc/self").exists(), reason="reads /proc")


@pytest.fixture
def bench(
    clip: FrozenCLIP, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., list[dict[str, Any]]]:
    """Run a subcommand on the random CLIP; its rows from the JSON file."""
    monkeypatch.setattr(cli, "random_clip", lambda name: clip)
    monkeypatch.setattr(round_module, "random_clip", lambda name: clip)

    def run(*arguments: str) -> list[dict[str, Any]]:
        target = tmp_path / "rows.json"
        result = CliRunner().invoke(cli.app, [*arguments, "--json", str(target)])
        if result.exception is not None:
            raise result.exception
        rows: list[dict[str, Any]] = json.loads(target.read_text())
        assert all(set(line) >= KEYS for line in rows)
        return rows

    return run


# Counting


def test_a_linear_layer_counts_two_operations_per_weight_and_row() -> None:
    layer = nn.Linear(20, 30)
    x = torch.randn(7, 20)
    assert count_gflop(lambda: layer(x)) == pytest.approx(2 * 7 * 20 * 30 / 1e9)
    # Backward to the weights only: one more product.
    assert count_gflop(lambda: layer(x).sum().backward()) == pytest.approx(4 * 7 * 20 * 30 / 1e9)


def test_custom_functions_and_their_backward_passes_are_counted() -> None:
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(w)
            out = x.new_empty(len(x), w.shape[1])
            return torch.mm(x, w, out=out)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
            return gradient @ ctx.saved_tensors[0].T, None

    x, w = torch.randn(7, 20, requires_grad=True), torch.randn(20, 30)
    gflop = count_gflop(lambda: Product.apply(x, w).sum().backward())
    assert gflop == pytest.approx(4 * 7 * 20 * 30 / 1e9)


def test_attention_is_counted_with_and_without_gradients() -> None:
    b, t, d = 2, 50, 64
    x = torch.randn(b, t, d)
    attention = nn.MultiheadAttention(d, 4, batch_first=True).eval().requires_grad_(False)
    projections, products = 4 * 2 * b * t * d * d, 2 * 2 * b * t * t * d
    with torch.no_grad():
        gflop = count_gflop(lambda: attention(x, x, x, need_weights=False))
    assert gflop == pytest.approx((projections + products) / 1e9)
    q = torch.randn(b, 4, t, d // 4)
    gflop = count_gflop(lambda: F.scaled_dot_product_attention(q, q, q))
    assert gflop == pytest.approx(products / 1e9)
    # Backward: the scores once more, and four gradients, each as large as one forward product.
    q.requires_grad_(True)
    gflop = count_gflop(lambda: F.scaled_dot_product_attention(q, q, q).sum().backward())
    assert gflop == pytest.approx((products + 5 * products / 2) / 1e9)


# Recording and replaying


def test_every_product_of_a_call_is_recorded_and_replayed() -> None:
    layer, w = nn.Linear(20, 30), torch.randn(5, 30, 4)
    x = torch.randn(5, 7, 20, requires_grad=True)

    def call() -> None:
        (layer(x) @ w).sum().backward()

    products = record(call)
    assert sorted({p.function.__name__ for p in products}) == ["addmm", "bmm", "mm"]
    replay = Replay(products)
    assert count_gflop(replay) == pytest.approx(count_gflop(call))
    # Its own backward pass hands the product a gradient that repeats one element.
    assert any(0 in operand.stride for p in products for operand in p.inputs)


# Comparing


def test_jobs_take_turns_and_the_check_sees_every_repeat() -> None:
    calls, seen = [], []

    def job(name: str) -> Callable[[int], str]:
        return lambda repeat: calls.append(f"{name}{repeat}") or f"{name}{repeat}"  # type: ignore[func-returns-value]

    measured = interleave(
        {"a": job("a"), "b": job("b")},
        repeats=2,
        warm_up=("a",),
        check=lambda repeat, results: seen.append((repeat, dict(results))),
    )
    assert calls == ["a0", "a0", "b0", "a1", "b1"]
    assert seen == [(0, {"a": "a0", "b": "b0"}), (1, {"a": "a1", "b": "b1"})]
    assert len(measured["a"].seconds) == len(measured["b"].seconds) == 2


def test_no_repeat_starts_after_the_budget() -> None:
    measured = interleave({"a": lambda repeat: None}, repeats=5, budget_s=0)
    assert len(measured["a"].seconds) == 1


def test_a_row_divides_by_the_clients_of_a_call() -> None:
    line = row("x", Measured(seconds=[4.0, 2.0]), Measured(seconds=[10.0, 6.0]), divide=4)
    assert (line["ours_s"], line["reference_s"], line["ratio"]) == (0.5, 6.0, 12.0)
    assert line["median_ratio"] == pytest.approx(8.0 / 0.75)


def test_differences_are_relative_to_the_largest_value_and_never_hide() -> None:
    reference = {"x": torch.tensor([1.0, -4.0]), "y": torch.tensor([2.0])}
    ours = {"x": torch.tensor([1.0, -4.0]), "y": torch.tensor([2.0002])}
    assert max_rel_diff(ours, reference) == pytest.approx(1e-4, rel=1e-3)
    nan = {**ours, "x": torch.tensor([float("nan"), -4.0])}
    for bad, against in ((nan, reference), (ours, {"x": torch.zeros(2)})):
        with pytest.raises(MismatchError, match="differ"):
            require_equal("case", max_rel_diff(bad, against))


@pytest.mark.parametrize("place", ["class_features", "forward"])
@pytest.mark.parametrize(
    "arguments",
    [
        ("step", "--classes", "5", "--context", "2", "--repeats", "1"),
        ("round", "--clients", "2", "--classes", "3", "--rounds", "2", "--small", ""),
        ("round", "--clients", "2", "--classes", "3", "--rounds", "2", "--small", "tiny"),
        ("limit", "--classes", "5", "--repeats", "1"),
    ],
    ids=["step", "extrapolated", "complete", "limit"],
)
def test_a_reference_that_computes_something_else_ends_the_run(
    bench: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    place: str,
) -> None:
    right = getattr(ReferenceCoOp, place)
    monkeypatch.setattr(ReferenceCoOp, place, lambda *a: 1.002 * right(*a))
    with pytest.raises(MismatchError, match="differ"):
        bench(*arguments)


def test_a_mismatch_is_one_line_and_exit_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**options: Any) -> None:
        raise MismatchError("step: the paths differ by 2e-03.")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == "bench: step: the paths differ by 2e-03.\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["step", "--classes", "ten"], "whole numbers from 1 on"),
        (["step", "--classes", "0"], "whole numbers from 1 on"),
        (["step", "--backbone", "tiny", "--classes", "346"], "346 classes"),
        (["step", "--backbone", "tny", "--classes", "5"], "Did you mean 'tiny'"),
        (["step", "--json", "/nowhere/rows.json"], "no such folder"),
        (["scale", "--methods", "promptfll", "--clients", "5"], "promptfl"),
    ],
)
def test_wrong_input_is_one_line_and_exit_status_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    says: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert says in said
    assert said.count("\n") == 1


# Jobs and memory


def test_class_lists_are_whole_and_real() -> None:
    assert [len(names) for names in LISTS] == [10, 45, 100, 345]
    assert all(len(set(names)) == len(names) for names in LISTS)
    assert not any("_" in name for names in LISTS for name in names)
    assert class_names(50) == CIFAR100[:50]
    for bad in (1, 346):
        with pytest.raises(UserError, match=f"{bad} classes"):
            class_names(bad)


def test_counts_of_a_job_by_hand() -> None:
    job = Job(3, Sizes(2, train=20, test=7, server_test=10), rounds=5, batch=8, test_batch=4)
    assert job.reference_counts() == {
        Piece("reference", "copy"): 10,
        Piece("reference", "step", 8): 20,  # 5 rounds, 2 clients, batches of 8, 8 and 4 images
        Piece("reference", "step", 4): 10,
        Piece("reference", "test", 4): 6 * (2 * 1 + 2),  # evaluations before and after 5 rounds
        Piece("reference", "test", 3): 6 * 2,
        Piece("reference", "test", 2): 6 * 1,
    }
    assert total(job.our_counts(), dict.fromkeys(job.our_counts(), 1.0)) == 64 / 16 + 5 + 1
    few = few_shot_job(10, classes=100, shots=8, tests=25, rounds=50)
    assert few.sizes == Sizes(10, train=80, test=250, server_test=2500)


def test_a_workspace_has_exactly_the_images_asked_for(clip: FrozenCLIP) -> None:
    sizes = Sizes(3, train=4, test=2, server_test=5)
    images = torch.arange(sizes.images, dtype=torch.float32)[:, None, None, None]
    workspace = make_workspace(clip, class_names(6), sizes)
    assert len(workspace.server_test()[1]) == 5
    taken = [workspace.partition.server_test.tolist()]
    for client in reference_clients(workspace, images):
        own = workspace.train_data(client.client)
        assert torch.equal(own.labels_N, client.train_labels)
        assert len(client.train_labels) == 4
        assert len(client.test_labels) == 2
        taken.append(client.train_images.flatten().int().tolist())
        taken.append(client.test_images.flatten().int().tolist())
    assert sorted(n for part in taken for n in part) == list(range(sizes.images))


@linux
def test_peak_memory_is_reset_and_sees_what_was_freed() -> None:
    reset_peak()
    before = peak_mb()
    assert before is not None
    torch.ones(25_000_000)  # 100 MB, freed at once
    after = peak_mb()
    assert after is not None
    assert 90 < after - before < 150
    reset_peak()
    low = peak_mb()
    assert low is not None
    assert low < after - 80
    private = private_mb()
    assert private is not None
    assert 0 < private <= low


def test_a_fresh_process_has_our_threads() -> None:
    assert in_fresh_process(torch.get_num_threads) == torch.get_num_threads()


# Subcommands


def test_step(clip: FrozenCLIP, bench: Callable[..., Any]) -> None:
    rows = bench("step", "--classes", "5,12", "--context", "2", "--repeats", "2")
    assert [r["case"] for r in rows] == [
        f"{part} C={c} M=2" for c in (5, 12) for part in ("text", "step")
    ]
    for line in rows:
        assert line["max_rel_diff"] < 1e-4
        assert line["clients"] > 1
        assert line["ratio"] == pytest.approx(line["reference_s"] / line["ours_s"])
        assert line["counted_ratio"] > 3
        assert line["share_of_saving"] == pytest.approx(line["ratio"] / line["counted_ratio"])
    # The whole step adds the image tower to the reference, and next to nothing to either path.
    images = count_gflop(lambda: clip.encode_images(torch.zeros(8, 3, 32, 32)))
    added = rows[1]["reference_gflop"] - rows[0]["reference_gflop"]
    assert images < added < 1.01 * images
    assert rows[1]["ours_gflop"] < 1.1 * rows[0]["ours_gflop"]


def test_round(bench: Callable[..., Any]) -> None:
    complete, large = bench(
        "round", "--clients", "3", "--classes", "4", "--rounds", "4", "--repeats", "1"
    )
    assert (complete["kind"], large["kind"]) == ("complete", "extrapolated")
    for line in (complete, large):
        assert line["max_rel_diff"] < 1e-4
        assert line["counted_ratio"] > 1
    for path in ("ours", "reference"):
        of_path = [p for p in large["pieces"] if p["piece"].startswith(path)]
        seconds = sum(p["seconds"] * p["times"] for p in of_path)
        assert large[f"{path}_s"] == pytest.approx(seconds)


def test_limit(bench: Callable[..., Any]) -> None:
    (line,) = bench("limit", "--classes", "5", "--repeats", "2", "--profile")
    assert line["share_of_limit"] == pytest.approx(line["reference_s"] / line["ours_s"])
    assert line["products_gflop"] > 0
    # Nothing but matrix products is worth counting in our step.
    assert line["other_gflop"] < 0.1 * line["products_gflop"]


@pytest.mark.parametrize("method", ["promptfl", "fedrsclip"])
def test_scale(method: str) -> None:
    options = ScaleOptions(participants=3, rounds=4, classes=4)
    line = measure(options, 6, method)
    assert line["participants"] == 3
    assert line["ours_s"] > 0
    if method == "promptfl":
        assert line["max_rel_diff"] < 1e-4
        assert line["stored_mb"] == 0
    else:
        assert line["reference_s"] is None
        assert line["stored_mb"] > 0


def test_memory(tmp_path: Path) -> None:
    config = write_experiment(tmp_path, MemoryOptions("tiny", classes=3, workers=0))
    ours, reference = inline_round(config), reference_step(config)
    assert set(ours) >= {"ours_s", "peak_mb", "private_mb", "libraries_mb"}
    assert reference["max_rel_diff"] < 1e-4


def test_overhead(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    target = tmp_path / "rows.json"
    out = Output("overhead", target)
    bench_overhead(OverheadOptions((6,), (0,), (), rounds=2), out)
    (line,) = json.loads(target.read_text())
    assert set(line) >= KEYS
    assert line["training_ms"] > 0
    assert line["ours_ms"] > 0
    assert line["repeats"] == 2
    assert "inline, 6 clients" in capsys.readouterr().out


@pytest.mark.slow
@linux
@pytest.mark.parametrize(
    "arguments",
    [
        ("overhead", "--clients", "4", "--rounds", "1", "--engine-clients", "4"),
        ("memory", "--backbone", "tiny", "--classes", "3", "--workers", "1"),
        ("scale", "--clients", "5,8", "--participants", "3", "--rounds", "4"),
        ("step", "--backbone", "tiny", "--classes", "5", "--context", "4", "--repeats", "1"),
    ],
    ids=lambda a: a[0],
)
def test_subcommands_in_processes_of_their_own(
    bench: Callable[..., Any], arguments: tuple[str, ...]
) -> None:
    rows = bench(*arguments)
    assert len(rows) >= 2
    if arguments[0] == "overhead":
        assert available()
        assert [r["workers"] for r in rows] == [0, 1, 2]
        assert all(r["reference_s"] > 0 and r["max_rel_diff"] < 1e-4 for r in rows)
