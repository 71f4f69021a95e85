"""Every subcommand on a tiny backbone, and one line for wrong input; no test asserts a time."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.main import get_command

import fedprompt.bench.cli as cli
import fedprompt.bench.scale as scale
from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.bench.compare import (
    MismatchError,
)
from fedprompt.bench.counting import count_gflop
from fedprompt.bench.estimates import EstimateOptions
from fedprompt.bench.flower_engine import available
from fedprompt.bench.machine import describe_machine, machine
from fedprompt.bench.methods import MethodsOptions, bench_methods
from fedprompt.bench.output import Output
from fedprompt.bench.overhead import OverheadOptions, bench_overhead
from fedprompt.bench.participants import ParticipantsOptions, measure
from fedprompt.errors import UserError
from fedprompt.runtime import cards
from fedprompt.runtime.cards import Card
from tests.bench.conftest import KEYS

HOST_ONLY = ["estimates", "scale", "placement"]
"""Commands that count positions and bytes on the host, and that simulate."""
linux = pytest.mark.skipif(not Path("/proc/self").exists(), reason="reads /proc")


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


def test_methods(bench: Callable[..., Any]) -> None:
    names = ["promptfl", "lora image_layers=1", "vpt"]
    rows = bench("methods", *names, "--backbone", "tiny", "--classes", "4", "--repeats", "2")
    assert [r["case"] for r in rows] == names
    for line in rows:
        assert line["times"] == pytest.approx(line["ours_s"] / rows[0]["ours_s"])
        assert line["repeats"] == 2
    context, adapters, visual = (r["measured_mb"] for r in rows)
    # Prompts of the image tower keep what one layer of adapters at its top does not.
    assert context < adapters < visual
    assert rows[0]["numbers_up"] == 16 * 128


@pytest.mark.parametrize("named", ["zero_shot", "lora r", " "])
def test_methods_without_a_step(named: str) -> None:
    options = MethodsOptions([named], EstimateOptions((), "tiny", classes=2), 1, 1.0)
    with pytest.raises(UserError, match="bench methods"):
        bench_methods(options, Output("methods"))


def test_backbone(bench: Callable[..., Any]) -> None:
    """Forms of the weights beside float32, on the embedded backbone and data."""
    rows = bench(
        "backbone", "--backbone", "tiny", "--weights", "float32,fp16", "--pruned", "0.5",
        "--classes", "4", "--repeats", "1", "--images-per-class", "2",
    )  # fmt: skip
    assert [r["case"] for r in rows] == ["float32", "fp16", "float32, 50 % pruned"]
    whole, half, pruned = rows
    assert whole["memory_ratio"] == whole["ratio"] == whole["images_ratio"] == 1
    assert whole["accuracy_change"] == 0
    assert whole["cosine"] == pytest.approx(1)
    assert 1.8 < half["memory_ratio"] < 2
    assert half["cosine"] > 0.999
    assert pruned["memory_ratio"] == 1
    assert pruned["cosine"] < half["cosine"]
    assert pruned["accuracy_change"] == pytest.approx(pruned["accuracy"] - whole["accuracy"])


def test_an_unknown_format_of_weights_is_named(bench: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="int9"):
        bench("backbone", "--backbone", "tiny", "--weights", "int9")


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


def test_every_command_but_the_simulation_takes_a_device_and_an_unknown_one_is_refused(
    bench: Callable[..., Any],
) -> None:
    options = {c.name: [p.name for p in c.params] for c in get_command(cli.app).commands.values()}  # type: ignore[attr-defined]
    assert [name for name, names in options.items() if "device" not in names] == HOST_ONLY
    with pytest.raises(UserError, match="tpu"):
        bench("limit", "--device", "tpu")


def test_a_row_names_the_card_and_the_share_of_its_limit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cards, "cards", lambda: [Card("H100", 80, 70, "550.1")])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    facts = cards.device_facts(torch.device("cuda"))
    assert (facts["card"], facts["driver"]) == ("H100", "550.1")
    assert "H100 (driver 550.1)" in describe_machine({**machine(), **facts})
    out = Output("step", tmp_path / "rows.json")
    out.add({"ours_gflop": out.machine["products_gflop_per_s"], "ours_s": 4.0})
    assert out.rows[0]["share_of_products"] == 0.25


@pytest.mark.parametrize("method", ["promptfl", "fedrsclip"])
def test_participants(method: str) -> None:
    options = ParticipantsOptions(participants=3, rounds=4, classes=4)
    line = measure(options, 6, method)
    assert line["participants"] == 3
    assert line["ours_s"] > 0
    if method == "promptfl":
        assert line["max_rel_diff"] < 1e-4
        assert line["stored_mb"] == 0
    else:
        assert line["reference_s"] is None
        assert line["stored_mb"] > 0


def test_scale(clip: FrozenCLIP, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    few = {"classes": (4, 8), "methods": (4, 8), "clients": (10, 20), "images": (500, 2000)}
    monkeypatch.setattr(scale, "QUICK", {**few, "runs": (2, 3)})
    monkeypatch.setattr(scale, "random_clip", lambda name: clip)
    target = tmp_path / "rows.json"
    options = scale.ScaleOptions(methods=("cocoop", "zero_shot"), quick=True)
    scale.bench_scale(options, Output("scale", target))
    rows = json.loads(target.read_text())
    assert [r["case"] for r in rows] == [
        "classes, promptfl",
        "classes, cocoop",
        "classes, zero_shot",
        "clients",
        "images",
        "runs",
    ]
    by_case = {r["case"]: r for r in rows}
    assert 0 < by_case["classes, promptfl"]["positions_exponent"] < 1
    # Ten clients train, however many there are.
    assert by_case["clients"]["positions_exponent"] == pytest.approx(0, abs=1e-9)
    assert by_case["classes, zero_shot"]["positions_exponent"] is None
    assert [p["size"] for p in by_case["images"]["points"]] == [500, 2000]
    assert all(r["peak_mb_law"]["points"] == 2 for r in rows if r["case"] != "classes, zero_shot")


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
        ("participants", "--clients", "5,8", "--participants", "3", "--rounds", "4"),
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
    ("arguments", "named"),
    [
        (["step", "--classes", "ten"], "whole numbers"),
        (["step", "--classes", "0"], "whole numbers"),
        (["step", "--backbone", "tiny", "--classes", "346"], "346 classes"),
        (["step", "--backbone", "tny", "--classes", "5"], "'tiny'"),
        (["scale", "--axes", "clases"], "'classes'"),
        (["step", "--json", "/nowhere/rows.json"], "/nowhere/rows.json"),
        (["scale", "--axes", "methods", "--methods", "promptfll"], "promptfl"),
    ],
)
def test_wrong_input_is_one_line_and_exit_status_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    named: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    message = capsys.readouterr().err
    assert ended.value.code == 2
    assert named in message
    assert message.count("\n") == 1
