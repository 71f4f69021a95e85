"""FedBuff: steps of the server driven by the simulated clock."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprompt.errors import UserError
from fedprompt.experiment.checkpoint import checkpoint_bytes, read_checkpoint
from fedprompt.federation.asynchronous import BufferedFederation, open_federation
from fedprompt.federation.registry import all_strategies
from fedprompt.federation.server_app import Federation
from fedprompt.messages import Parcel, to_arrays
from fedprompt.methods.base import Tensors
from fedprompt.simulation.inline_grid import InlineGrid
from fedprompt.training import train_clients
from fedprompt.workspace import Workspace
from tests.support.builders import small_config
from tests.support.secure_rounds import ON, MakeWorkspace

INSTANT = {
    "enabled": True, "step_s": 0, "down_mbps": None, "up_mbps": None, "latency_s": 0
}  # fmt: skip
SPREAD = {"enabled": True, "speed_spread": 1.0, "jitter": 0.5}
PRIVATE = {"name": "fedpgp"}


def buffered(make_workspace: MakeWorkspace, grid: Any = InlineGrid, **sections: Any) -> Federation:
    settings = {"enabled": True, "buffer": 2, **sections.pop("asynchronous", {})}
    workspace = make_workspace(**{"clock": SPREAD, **sections}, asynchronous=settings)
    federation = open_federation(workspace, grid(workspace))
    assert isinstance(federation, BufferedFederation)
    federation.join()
    return federation


def shared_of(federation: Federation) -> dict[str, bytes]:
    return {n: a.tobytes() for n, a in to_arrays(federation.arrays).items()}


def private_of(federation: Federation) -> dict[int, dict[str, bytes]]:
    store = federation.grid.private  # type: ignore[attr-defined]
    clients = range(federation.workspace.num_clients)
    return {c: {n: t.numpy().tobytes() for n, t in (store.get(c) or {}).items()} for c in clients}


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_without_delays_and_with_full_buffers_it_is_fedavg(
    make_workspace: MakeWorkspace, fraction: float
) -> None:
    sections: dict[str, Any] = {"federation": {"fraction": fraction}, "method": PRIVATE}
    workspace = make_workspace(**sections)
    plain = Federation(workspace, InlineGrid(workspace))
    plain.join()
    buffer = {"buffer": round(4 * fraction)}
    steps = buffered(make_workspace, clock=INSTANT, asynchronous=buffer, **sections)
    for server_round in (1, 2, 3):
        line, other = steps.train_round(server_round), plain.train_round(server_round)
        assert line.pop("clock")["seconds"] == 0
        assert line.pop("asynchronous")["max_staleness"] == 0
        assert line == other
        assert shared_of(steps) == shared_of(plain)
    assert private_of(steps) == private_of(plain)
    assert steps.asked == plain.asked


def twin(workspace: Workspace, steps: int, buffer: int, exponent: float) -> list[Tensors]:
    """FedBuff as algorithm 1 has it: everyone trains at once, alone, and when asked.

    All clients train at a time, so none is drawn. Shared tensors after each step.
    """
    config, method = workspace.config, workspace.method
    clock = BufferedFederation(workspace, InlineGrid(workspace)).presence.clock
    assert clock is not None
    now, shared = 0.0, method.init_shared(config.seed)
    history, training, idle = [], [], list(range(workspace.num_clients))
    for step in range(1, steps + 1):
        received: list[tuple[int, int, Tensors, int]] = []
        while len(received) < buffer:
            for client in idle:
                data = workspace.train_data(client)
                (result,) = train_clients(
                    method, [shared], [{}], [data], config.training,
                    seed=config.seed, server_round=step, rounds=config.federation.rounds,
                )  # fmt: skip
                change = {n: result.shared[n].double() - v.double() for n, v in shared.items()}
                count = math.ceil(len(data) / config.training.batch_size)
                done = now + clock.seconds(step, client, config.training.local_epochs * count)
                training.append((done, client, step, change, len(data)))
            idle = []
            training.sort(key=lambda task: task[:2])
            now, client, version, change, images = training.pop(0)
            received.append((client, version, change, images))
        total = sum(images for *_, images in received)
        shared = {
            n: (
                v.double()
                + sum(
                    (1 + step - version) ** -exponent * change[n] * images / total
                    for _, version, change, images in received
                )
            ).float()
            for n, v in shared.items()
        }
        idle = [client for client, *_ in received]
        history.append(shared)
    return history


@pytest.mark.parametrize("exponent", [0.5, 0.0])
def test_steps_are_those_of_the_algorithm(make_workspace: MakeWorkspace, exponent: float) -> None:
    sections: dict[str, Any] = {"method": {"name": "promptfl"}}
    settings = {"buffer": 2, "staleness_exponent": exponent}
    ours = buffered(make_workspace, asynchronous=settings, **sections)
    expected = twin(ours.workspace, steps=5, buffer=2, exponent=exponent)
    stale = 0
    for step in range(1, 6):
        stale += ours.train_round(step)["asynchronous"]["max_staleness"]
        for name, array in to_arrays(ours.arrays).items():
            np.testing.assert_allclose(array, expected[step - 1][name], rtol=1e-4, atol=1e-6)
    assert stale > 1


class Backwards(InlineGrid):
    """Runs its blocks in the opposite order, as other workers may."""

    def _run_blocks(
        self, kind: str, blocks: Sequence[Sequence[Parcel]], deadline: float
    ) -> dict[int, list[bytes]]:
        found = super()._run_blocks(kind, blocks[::-1], deadline)
        return {len(blocks) - 1 - place: replies for place, replies in found.items()}


def test_results_do_not_depend_on_where_clients_run(make_workspace: MakeWorkspace) -> None:
    sections: dict[str, Any] = {
        "simulation": {"clients_per_block": 1, "threads": 1},
        "method": PRIVATE,
        "conditions": {"available": 0.8, "dropout": 0.2},
    }
    one, other = (buffered(make_workspace, grid, **sections) for grid in (InlineGrid, Backwards))
    for step in (1, 2, 3, 4):
        assert one.train_round(step) == other.train_round(step)
    assert shared_of(one) == shared_of(other)
    assert private_of(one) == private_of(other)


def test_a_resumed_run_goes_on_in_the_middle_of_everything(
    make_workspace: MakeWorkspace, tmp_path: Path
) -> None:
    sections: dict[str, Any] = {
        "method": PRIVATE,
        "conditions": {"dropout": 0.3, "seed": 5},
        "asynchronous": {"buffer": 1},
    }
    whole, broken = (buffered(make_workspace, **sections) for _ in range(2))
    lines = [[f.train_round(r) for r in (1, 2)] for f in (whole, broken)]
    assert lines[0] == lines[1]
    assert isinstance(broken, BufferedFederation)
    assert min(broken.flight.versions) < 2, "some train from older tensors"
    checkpoint = broken.checkpoint(2, {"rejected": 0})
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(checkpoint_bytes(checkpoint, {}))

    def kept(workspace: Workspace) -> InlineGrid:
        return InlineGrid(workspace, broken.grid.private)  # type: ignore[attr-defined]

    resumed = buffered(make_workspace, kept, **sections)
    resumed.restore(read_checkpoint(path))
    assert [resumed.train_round(r) for r in (3, 4, 5)] == [whole.train_round(r) for r in (3, 4, 5)]
    assert shared_of(resumed) == shared_of(whole)
    assert private_of(resumed) == private_of(whole)
    assert resumed.asked == whole.asked


def test_a_client_in_flight_has_not_trained_yet(make_workspace: MakeWorkspace) -> None:
    federation = buffered(make_workspace, asynchronous={"buffer": 1}, method=PRIVATE)
    line = federation.train_round(1)
    (first,) = line["clock"]["clients"]
    assert [c for c, state in private_of(federation).items() if state] == [int(first)]
    assert line["clients"] == {"sampled": 1, "accepted": 1, "rejected": 0}
    assert line["asynchronous"]["training"] == 3


def test_a_step_ends_when_nobody_is_left(make_workspace: MakeWorkspace, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("1,x,0,0\n0,0,0,0\n")
    sections: dict[str, Any] = {"conditions": {"trace": str(trace)}, "method": {"name": "promptfl"}}
    federation = buffered(make_workspace, asynchronous={"buffer": 3}, **sections)
    line = federation.train_round(1)
    assert line["clients"] == {"sampled": 2, "accepted": 1, "rejected": 0, "absent": 1}
    assert line["bytes_down"] > 1.5 * line["bytes_up"] > 0
    before = shared_of(federation)
    line = federation.train_round(2)
    assert line["clients"]["sampled"] == line["clock"]["seconds"] == 0
    assert shared_of(federation) == before


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"clock": {"enabled": False}}, r"clock\.enabled"),
        ({"clock": {"deadline_s": 3.0}}, "deadline_s"),
        ({"secure_aggregation": ON}, "secure_aggregation"),
        ({"privacy": {"noise": 1.0}}, r"privacy\.noise"),
        ({"partition": {"labels_per_round": 2, "active_rounds": 1}}, "labels_per_round"),
        ({"asynchronous": {"buffer": 99}}, r"buffer=99"),
        ({"federation": {"min_replies": 3}}, r"min_replies=3"),
        ({"strategy": {"name": "clustered"}}, "clustered"),
        ({"strategy": {"name": "dp_fedavg"}}, "dp_fedavg"),
    ],
)
def test_what_needs_rounds_is_refused(sections: dict[str, Any], says: str) -> None:
    raw: dict[str, Any] = {
        "clock": {"enabled": True, **sections.pop("clock", {})},
        "asynchronous": {"enabled": True, "buffer": 2, **sections.pop("asynchronous", {})},
        "strategy": {"name": "fedavg"},
    }
    with pytest.raises(UserError, match=says):
        small_config(**{**raw, **sections})


def test_strategies_that_know_single_clients_are_told_apart() -> None:
    able = {n for n, rule in all_strategies().items() if rule.works_without_rounds()}
    assert {"fedavg", "fedadam", "fedavgm", "median", "krum"} <= able
    assert not {"aligned", "clustered", "nearest_peers", "posterior_samples", "dp_fedavg"} & able
    assert not {"per_class", "per_expert"} & able, "shares in an upload are no changes"


@pytest.mark.parametrize("method", ["afl", "tofa"])
def test_uploads_that_are_no_changes_are_refused(
    make_workspace: MakeWorkspace, method: str
) -> None:
    with pytest.raises(UserError, match=method):
        buffered(make_workspace, method={"name": method})
