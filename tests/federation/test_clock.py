"""The seconds of a simulated clock, and replies that miss the deadline."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedprompt.config.conditions import ClockConfig
from fedprompt.config.fields import build
from fedprompt.deploy.node_config import on_server
from fedprompt.errors import UserError
from fedprompt.experiment.summary import absent_updates, simulated_seconds
from fedprompt.federation.clock import Clock, Device, message_bytes, parse_devices
from fedprompt.federation.server_app import Federation
from fedprompt.messages import Traffic, to_arrays
from fedprompt.methods.parts.schedule import local_steps
from fedprompt.reports.result_tables import remarks
from fedprompt.simulation.inline_grid import InlineGrid
from fedprompt.workspace import Workspace
from tests.support.builders import small_config
from tests.support.secure_rounds import ON, MakeWorkspace

PROMPTFL: dict[str, Any] = {"method": {"name": "promptfl"}}


def joined(workspace: Workspace) -> Federation:
    federation = Federation(workspace, InlineGrid(workspace))
    federation.join()
    return federation


def written(folder: Path, step_s: Sequence[float]) -> str:
    """A file of devices with these seconds per step, and no other time."""
    path = folder / "devices.csv"
    rows = [f"{k},{s},1e12,1e12\n" for k, s in enumerate(step_s)]
    path.write_text("client,step_s,down_mbps,up_mbps\n" + "".join(rows))
    return str(path)


def test_a_client_takes_what_its_bytes_and_steps_take() -> None:
    config = ClockConfig(True, step_s=0.5, down_mbps=8.0, up_mbps=2.0, latency_s=0.25)
    clock = Clock(config, 1, 3, Traffic(down=3_000_000, up=1_000_000))
    # 2 x 0.25 s, 24 Mbit at 8, 6 steps, 8 Mbit at 2.
    assert clock.seconds(1, 0, steps=6) == pytest.approx(0.5 + 3 + 3 + 4)
    assert clock.seconds(1, 0, 0) == clock.seconds(9, 2, 0) == pytest.approx(7.5)
    free = ClockConfig(True, step_s=0, down_mbps=None, up_mbps=None, latency_s=0)
    assert Clock(free, 1, 3, Traffic(10**9, 10**9)).seconds(1, 0, 100) == 0


def test_devices_differ_by_client_and_seconds_by_round() -> None:
    spread = ClockConfig(True, speed_spread=0.5, bandwidth_spread=1.0, jitter=0.3)
    clock = Clock(spread, 1, 400, Traffic(1000, 1000))
    devices = [clock.device(c) for c in range(400)]
    logs = [math.log(0.1 / d.step_s) for d in devices]
    assert sum(logs) / 400 == pytest.approx(0, abs=0.1)
    assert math.sqrt(sum(x * x for x in logs) / 400) == pytest.approx(0.5, abs=0.05)
    assert len({d.up_mbps for d in devices}) == 400
    assert all(d.up_mbps / 10.0 != d.down_mbps / 50.0 for d in devices if d.up_mbps and d.down_mbps)
    assert clock.seconds(1, 7, 3) != clock.seconds(2, 7, 3) != clock.seconds(2, 8, 3)
    again = Clock(replace(spread, seed=1), 9, 400, Traffic(1000, 1000))
    assert again.seconds(2, 8, 3) == clock.seconds(2, 8, 3)


def test_the_bytes_are_those_of_the_messages(make_workspace: MakeWorkspace) -> None:
    workspace = make_workspace(**PROMPTFL, federation={"fraction": 0.5})
    line = joined(workspace).train_round(1)
    counted = message_bytes(workspace.shared_shapes, workspace.extras_shapes)
    real = Traffic(line["bytes_down"] // 2, line["bytes_up"] // 2)
    tensors = 4 * sum(map(math.prod, workspace.shared_shapes.values()))
    # Flower's metadata and the names of further losses are a few hundred bytes.
    assert tensors < counted.down <= real.down < counted.down + 400
    assert tensors < counted.up <= real.up < counted.up + 400


def test_a_round_takes_as_long_as_its_slowest_client(
    make_workspace: MakeWorkspace, tmp_path: Path
) -> None:
    clock = {"enabled": True, "latency_s": 0, "devices": written(tmp_path, [1, 2, 3, 4])}
    timed = joined(make_workspace(clock=clock, **PROMPTFL))
    plain = joined(make_workspace(**PROMPTFL))
    lines = [timed.train_round(r) for r in (1, 2)]
    workspace = timed.workspace
    expected = {
        str(c): (c + 1) * local_steps(len(workspace.partition.train(c)), workspace.config.training)
        for c in range(4)
    }
    found = lines[0].pop("clock")
    assert found["clients"] == pytest.approx(expected, rel=1e-6)
    assert found["seconds"] == max(found["clients"].values())
    del lines[1]["clock"]
    assert lines == [plain.train_round(r) for r in (1, 2)], "a clock changes no result"
    both = [{"clock": {"seconds": 2.0}}, {"clock": {"seconds": 0.5}}]
    assert simulated_seconds([{"round": 0}, *both]) == {"simulated_seconds": 2.5}
    assert simulated_seconds([{"round": 0}]) == {}


def test_late_replies_are_those_of_clients_that_dropped_out(
    make_workspace: MakeWorkspace, tmp_path: Path
) -> None:
    sections: dict[str, Any] = {"method": {"name": "fedpgp"}}
    clock = {
        "enabled": True, "latency_s": 0, "deadline_s": 1.0,
        "devices": written(tmp_path, [0, 0, 99, 0]),
    }  # fmt: skip
    trace = tmp_path / "trace.csv"
    trace.write_text("1,1,x,1\n")
    late = joined(make_workspace(clock=clock, **sections))
    gone = joined(make_workspace(conditions={"trace": str(trace)}, **sections))
    line, other = late.train_round(1), gone.train_round(1)
    assert line["clients"] == other["clients"]
    assert line["clients"]["absent"] == 1
    assert "deadline_s=1" in line["absent"]["2"]
    assert line["clock"]["seconds"] == 1.0, "the server has waited until then"
    for lines, counts in (([line], (0, 1)), ([other], (1, 0)), ([line, other], (1, 1))):
        (found,) = absent_updates([{"round": 0}, *lines]).values()
        assert (found["dropped_out"], found["late"]) == counts
        assert found["asked"] == 4 * len(lines)
        assert "update" in remarks({"absent_updates": found})[0]
    assert absent_updates([{"round": 0, "clients": None}]) == {}
    assert {n: a.tobytes() for n, a in to_arrays(late.arrays).items()} == {
        n: a.tobytes() for n, a in to_arrays(gone.arrays).items()
    }
    assert late.grid.private.get(2) is None  # type: ignore[attr-defined]
    assert late.grid.private.get(1)  # type: ignore[attr-defined]


def test_both_kinds_of_files_are_read() -> None:
    csv = b"client, up_mbps, down_mbps, step_s\n1,3,2,1\n0,6,5,4\n"
    rows = [
        {"client": c, "step_s": s, "down_mbps": d, "up_mbps": u}
        for c, s, d, u in ((1, 1, 2, 3), (0, 4, 5, 6))
    ]
    wanted = {0: Device(4, 5, 6), 1: Device(1, 2, 3)}
    assert parse_devices(csv, Path("d.csv"), 2) == wanted
    assert parse_devices(json.dumps(rows).encode(), Path("d.json"), 2) == wanted


HEAD = "client,step_s,down_mbps,up_mbps\n"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("client,step_s,down_mbps\n0,1,1\n", "up_mbps"),
        (f"{HEAD}0,1,1,1\n", "client 1"),
        (f"{HEAD}0,1,1,1\n0,1,1,1\n", "twice"),
        (f"{HEAD}0,1,0,1\n1,1,1,1\n", "client 0"),
        (f"{HEAD}0,fast,1,1\n", "fast"),
        (f"{HEAD}0,1,1\n1,1,1\n", "no table"),
        (f"{HEAD}0,1e300,1,1\n1,1,1,1\n", "client 0"),
        (f"{HEAD}0,1,1e-300,1\n1,1,1,1\n", "client 0"),
        (f"{HEAD}0,1,inf,1\n1,1,1,1\n", "client 0"),
        (f"{HEAD}nan,1,1,1\n1,1,1,1\n", "client nan"),
    ],
)
def test_other_files_are_refused(content: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as refused:
        parse_devices(content.encode(), Path("d.csv"), 2)
    assert "clock.devices" in str(refused.value)


@pytest.mark.parametrize(
    ("value", "says"), [("true", "True"), ("null", "table"), (str(10**400), "table"), ("NaN", "0")]
)
def test_other_json_is_refused(value: str, says: str) -> None:
    row = f'{{"client": 0, "step_s": 1, "down_mbps": {value}, "up_mbps": 1}}'
    with pytest.raises(UserError, match=says):
        parse_devices(f"[{row}]".encode(), Path("d.json"), 1)
    with pytest.raises(UserError, match="table"):
        parse_devices(b"[" * 100_000, Path("d.JSON"), 1)


@pytest.mark.parametrize("spread", ["speed_spread", "bandwidth_spread", "jitter"])
def test_seconds_are_finite_at_the_largest_spreads(spread: str) -> None:
    largest = {"enabled": True, "step_s": 1e6, "down_mbps": 1e-6, "up_mbps": 1e-6, spread: 10}
    clock = Clock(build(ClockConfig, largest, "clock"), 1, 300, Traffic(10**9, 10**9))
    assert all(math.isfinite(clock.seconds(1, c, 10**6)) for c in range(300))
    for key, value in {spread: 1000, "step_s": 1e300, "up_mbps": 1e-300}.items():
        with pytest.raises(UserError, match=key):
            build(ClockConfig, {key: value}, "clock")


def test_a_deadline_that_everybody_misses_is_refused(make_workspace: MakeWorkspace) -> None:
    clock = {"enabled": True, "deadline_s": 0.01}
    with pytest.raises(UserError, match=r"deadline_s=0\.01"):
        joined(make_workspace(clock=clock, **PROMPTFL))
    joined(make_workspace(clock={**clock, "jitter": 0.1}, **PROMPTFL))
    joined(make_workspace(clock={**clock, "deadline_s": 100.0}, **PROMPTFL))


def test_settings_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    for key, value in {"deadline_s": 1.0, "devices": "d.csv"}.items():
        with pytest.raises(UserError, match=key):
            build(ClockConfig, {key: value}, "clock")
    with pytest.raises(UserError, match=r"no\.csv"):
        Clock(ClockConfig(True, devices=str(tmp_path / "no.csv")), 1, 4, Traffic())
    with pytest.raises(UserError, match=r"clock\.enabled"):
        small_config(clock={"enabled": True}, secure_aggregation=ON, strategy={"name": "fedavg"})
    with pytest.raises(UserError, match="'clock'"):
        on_server(small_config(clock={"enabled": True}))
