"""Who can be asked in a round, and who drops out of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message, MessageType

from fedprompt.config.conditions import ConditionsConfig
from fedprompt.config.fields import build
from fedprompt.deploy.node_config import on_server
from fedprompt.errors import UserError
from fedprompt.federation.client_app import handle
from fedprompt.federation.server_app import Federation
from fedprompt.federation.trace import Trace, parse_trace
from fedprompt.messages import to_arrays
from fedprompt.methods.base import Tensors
from fedprompt.simulation.inline_grid import InlineGrid
from fedprompt.simulation.memory_store import MemoryStore
from fedprompt.workspace import Workspace
from tests.support.builders import small_config
from tests.support.secure_rounds import ON, MakeWorkspace

ONE_BY_ONE = {"clients_per_block": 1, "threads": 1}


def written(folder: Path, rows: Sequence[str]) -> dict[str, Any]:
    """A `conditions` section with a trace of these rows, one character per client."""
    path = folder / "trace.csv"
    path.write_text("".join(",".join(row) + "\n" for row in rows))
    return {"trace": str(path)}


def joined(workspace: Workspace, **options: Any) -> Federation:
    federation = Federation(workspace, InlineGrid(workspace, **options))
    federation.join()
    return federation


def state(federation: Federation) -> tuple[dict[str, bytes], dict[int, dict[str, bytes]]]:
    """Shared tensors, and every client's private ones, as bytes."""
    private = federation.grid.private  # type: ignore[attr-defined]
    clients = range(federation.workspace.num_clients)
    own = {c: {n: t.numpy().tobytes() for n, t in (private.get(c) or {}).items()} for c in clients}
    return {n: a.tobytes() for n, a in to_arrays(federation.arrays).items()}, own


def test_a_trace_without_absence_changes_nothing(
    make_workspace: MakeWorkspace, tmp_path: Path
) -> None:
    sections: dict[str, Any] = {"federation": {"fraction": 0.5}, "method": {"name": "fedpgp"}}
    plain = joined(make_workspace(**sections))
    traced = joined(make_workspace(conditions=written(tmp_path, ["1111"]), **sections))
    lines = [[f.train_round(r) for r in (1, 2, 3)] for f in (plain, traced)]
    assert lines[0] == lines[1]
    assert state(plain) == state(traced)
    assert state(plain)[1]


def test_a_client_that_drops_out_neither_trains_nor_counts(
    make_workspace: MakeWorkspace, tmp_path: Path
) -> None:
    sections: dict[str, Any] = {"method": {"name": "fedpgp"}, "simulation": ONE_BY_ONE}
    traced = joined(make_workspace(conditions=written(tmp_path, ["11x1", "1111"]), **sections))

    def answer(
        workspace: Workspace,
        clients: Sequence[int],
        messages: Sequence[Message],
        private: Mapping[int, Tensors],
    ) -> tuple[list[Message], dict[int, Tensors]]:
        train = messages[0].metadata.message_type == MessageType.TRAIN
        if train and clients[0] == 2 and messages[0].metadata.group_id == "1":
            raise RuntimeError("away")
        return handle(workspace, clients, messages, private)

    twin = joined(make_workspace(**sections), answer=answer)
    line, other = traced.train_round(1), twin.train_round(1)
    assert line["clients"] == {"sampled": 4, "accepted": 3, "rejected": 0, "absent": 1}
    assert [*line["absent"]] == ["2"]
    assert "dropped" not in line
    assert line["bytes_down"] == other["bytes_down"], "it was sent the prompts"
    assert line["bytes_up"] < other["bytes_up"], "not even an error comes back"
    assert line["client_steps"] == other["client_steps"]
    assert traced.strategy.participants == [0, 1, 3]
    assert state(traced) == state(twin)
    assert not state(traced)[1][2]
    assert "absent" not in traced.train_round(2)
    twin.train_round(2)
    assert state(traced) == state(twin)


def test_only_clients_that_are_present_are_asked(
    make_workspace: MakeWorkspace, tmp_path: Path
) -> None:
    workspace = make_workspace(
        conditions=written(tmp_path, ["0101", "0000", "1110"]), federation={"fraction": 0.5}
    )
    federation = joined(workspace)
    assert federation.train_round(1)["clients"]["accepted"] == 2
    assert federation.strategy.sampled == [1, 3]
    before = state(federation)
    line = federation.train_round(2)
    assert line["clients"]["sampled"] == line["bytes_down"] == 0
    assert state(federation) == before
    assert federation.train_round(3)["clients"]["sampled"] == 2
    assert 3 not in federation.strategy.sampled
    assert federation.strategy.clients == [0, 1, 2, 3], "all of them are tested"
    federation.train_round(4)
    assert federation.strategy.sampled == [1, 3], "the rows begin again"


def test_a_resumed_run_asks_the_same_clients(make_workspace: MakeWorkspace) -> None:
    sections: dict[str, Any] = {
        "conditions": {"available": 0.6, "dropout": 0.3},
        "method": {
            "name": "promptfl"
        },  # without private tensors, which the grid would have to keep
    }
    whole, broken = (joined(make_workspace(**sections)) for _ in range(2))
    whole.train_round(1)
    broken.train_round(1)
    resumed = joined(make_workspace(**sections))
    resumed.restore(broken.checkpoint(1, {"rejected": 0}))
    assert [resumed.train_round(r) for r in (2, 3)] == [whole.train_round(r) for r in (2, 3)]
    assert resumed.asked == whole.asked
    assert state(resumed)[0] == state(whole)[0]


def test_masked_sums_open_without_those_who_left(
    make_workspace: MakeWorkspace, tmp_path: Path
) -> None:
    secure = {**ON, "shares": 0}
    federation = joined(
        make_workspace(conditions=written(tmp_path, ["1x11"]), secure_aggregation=secure)
    )
    line = federation.train_round(1)
    assert line["clients"]["accepted"] == 3
    assert "void" not in line["secure"]
    assert [*line["absent"]] == ["1"]


def test_too_few_for_a_masked_sum_are_not_accepted(
    make_workspace: MakeWorkspace, tmp_path: Path
) -> None:
    rows = written(tmp_path, ["1x00", "0000", "1101"])
    federation = joined(make_workspace(conditions=rows, secure_aggregation=ON))
    line = federation.train_round(1)
    assert line["clients"] == {"sampled": 2, "accepted": 0, "rejected": 0, "absent": 1}
    assert line["client_steps"] == 0
    assert federation.train_round(2)["clients"]["accepted"] == 0
    assert federation.train_round(3)["clients"]["accepted"] == 3, "one that is away changes nothing"


def test_draws_are_those_of_client_and_round() -> None:
    config = ConditionsConfig(available=0.5, dropout=0.5)
    trace = Trace(config, 1, 6)
    rounds = range(1, 40)
    drawn = [trace.present(r, range(6)) for r in rounds]
    assert drawn[:3] == [[1, 3], [0, 1, 2, 3, 4], [1, 3, 4]], "pinned: published runs depend on it"
    assert [[c for c in trace.present(r, [4, 1]) if c == 4] for r in rounds] == [
        [c for c in d if c == 4] for d in drawn
    ], "whoever else is asked about"
    left = {(r, c) for r in rounds for c in range(6) if trace.drops_out(r, c)}
    assert left != {(r, c) for r, d in zip(rounds, drawn, strict=True) for c in d}
    assert 0.4 < len(left) / (6 * len(rounds)) < 0.6
    fixed = replace(config, seed=1)
    assert [Trace(fixed, 9, 6).present(r, range(6)) for r in rounds] == drawn
    assert [Trace(config, 9, 6).present(r, range(6)) for r in rounds] != drawn


def test_both_kinds_of_files_are_read() -> None:
    wanted = (("1", "0"), ("x", "1"))
    assert parse_trace(b"1,0\n\nx, 1\n", Path("t.csv"), 2) == wanted
    assert parse_trace(json.dumps([[1, 0], ["x", 1]]).encode(), Path("t.json"), 2) == wanted


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("t.csv", "1,0\n1\n", "row 2"),
        ("t.csv", "1,2\n", "'2'"),
        ("t.csv", "\n", "no rows"),
        ("t.json", "[[1, 0]", "t.json"),
        ("t.json", "[1, 0]", "t.json"),
        ("t.json", "[" * 100_000, "recursion"),
        ("t.csv", "x,0\n0,0\n", "nobody"),
    ],
)
def test_other_files_are_refused(name: str, content: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as refused:
        parse_trace(content.encode(), Path(name), 2)
    assert "conditions.trace" in str(refused.value)


def test_settings_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'trace'"):
        build(ConditionsConfig, {"trace": "t.csv", "dropout": 0.1}, "conditions")
    with pytest.raises(UserError, match=r"nothing\.csv"):
        Trace(ConditionsConfig(trace=str(tmp_path / "nothing.csv")), 1, 4)
    with pytest.raises(UserError, match="conditions"):
        on_server(small_config(conditions={"dropout": 0.1}))


def test_another_trace_is_noticed(make_workspace: MakeWorkspace, tmp_path: Path) -> None:
    digests = [
        Federation(w, InlineGrid(w, MemoryStore())).describe()["trace"]
        for rows in (["1111"], ["11x1"])
        for w in [make_workspace(conditions=written(tmp_path, rows))]
    ]
    assert digests[0] != digests[1]
