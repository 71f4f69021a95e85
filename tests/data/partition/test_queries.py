"""Active learning: the rules against loops, PCB, and what a run reveals when."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedprompt.config.schema import PartitionConfig
from fedprompt.data.partition.queries import (
    ASKED,
    balanced,
    by_distance,
    by_entropy,
    by_gradient,
    select,
)
from fedprompt.data.partition.stages import stage_of
from fedprompt.errors import UserError
from fedprompt.federation.server_app import Federation
from fedprompt.files.tensors import array_checksum
from fedprompt.messages import to_arrays
from fedprompt.methods.base import UNLABELLED
from fedprompt.rng import generator
from fedprompt.simulation.inline_grid import InlineGrid
from fedprompt.workspace import Workspace
from tests.support.builders import small_config
from tests.support.displays import StopAfter
from tests.support.recorded_runs import play, play_on

N, C, D = 60, 4, 8


@pytest.fixture
def images() -> tuple[np.ndarray, np.ndarray]:
    """Features and a model's answers."""
    draw = generator(0, "pool")
    features_ND = draw.standard_normal((N, D))
    features_ND /= np.linalg.norm(features_ND, axis=1, keepdims=True)
    answers_NC = draw.dirichlet(np.full(C, 0.7), N)
    return features_ND, answers_NC


def test_entropy_and_coreset_are_those_of_loops(images: Any) -> None:
    features_ND, answers_NC = images
    entropy = [-sum(p * np.log(p + 1e-6) for p in row) for row in answers_NC]
    assert by_entropy(answers_NC).tolist() == sorted(range(N), key=lambda i: -entropy[i])
    known, pool = features_ND[:3], features_ND[3:]
    taken: list[int] = []
    for _ in range(9):
        near = [*known, *(pool[t] for t in taken)]
        gaps = [min(np.linalg.norm(v - other) for other in near) for v in pool]
        taken.append(int(np.argmax(gaps)))
    assert by_distance(known, pool, 9).tolist() == taken
    assert sorted(by_distance(known, np.repeat(pool[:1], 5, 0), 5)) == [0, 1, 2, 3, 4]


def test_badge_is_k_means_plus_plus_on_whole_gradients(images: Any) -> None:
    features_ND, answers_NC = images
    whole = []
    for v, p in zip(features_ND, answers_NC, strict=True):
        factor = -p
        factor[p.argmax()] += 1
        whole.append(np.outer(factor, v).ravel())
    draw = generator(3, "badge")
    taken = [int(np.argmax([np.linalg.norm(g) for g in whole]))]
    while len(taken) < 12:
        gaps = [min(np.linalg.norm(g - whole[t]) for t in taken) ** 2 for g in whole]
        share = np.cumsum(gaps) / sum(gaps)
        taken.append(int(np.searchsorted(share, draw.random(), side="right")))
    assert by_gradient(features_ND, answers_NC, 12, generator(3, "badge")).tolist() == taken
    same = np.repeat(features_ND[:1], 4, 0), np.repeat(answers_NC[:1], 4, 0)
    assert sorted(by_gradient(*same, 4, generator(3, "badge"))) == [0, 1, 2, 3]


def test_pcb_serves_the_rarest_class_and_leaves_out_the_unreachable() -> None:
    """The released code draws at random from the time when class 3 cannot be found."""
    pseudo = np.array([0] * 20 + [1] * 20 + [2] * 2)
    for seed in range(5):
        rows = balanced(pseudo, np.array([3, 0, 1, 0]), 9, generator(seed, "pcb"))
        assert len(set(rows.tolist())) == 9
        assert Counter(pseudo[rows].tolist()) == {1: 5, 2: 2, 0: 2}
    assert len(balanced(pseudo, np.zeros(4, dtype=np.int64), 42, generator(0, "pcb"))) == 42


@pytest.mark.parametrize("query", ["random", "entropy", "coreset", "badge"])
@pytest.mark.parametrize("even", [False, True])
def test_a_query_asks_hidden_labels_only_and_no_more_than_its_budget(
    images: Any, query: Any, even: bool
) -> None:
    options = replace(
        PartitionConfig(), labels_per_round=5, query=query, query_balanced=even,
        query_candidates=0.25,
    )  # fmt: skip
    labels_N = np.full(N, UNLABELLED)
    for round_ in range(1, 14):
        rows = select(options, *images, labels_N, generator(1, "query", round_))
        assert len(rows) == len(set(rows.tolist())) == (5 if round_ <= 12 else 0)
        assert (labels_N[rows] == UNLABELLED).all()
        labels_N[rows] = rows % C


ACTIVE: dict[str, Any] = {
    "method": {"name": "promptfl", "context_tokens": 2},
    "partition": {"labels_per_round": 3, "active_rounds": 2, "query": "badge"},
    "federation": {"rounds": 4, "fraction": 0.5},
}


def test_rounds_are_divided_and_draws_never_come_again() -> None:
    config = small_config(**ACTIVE)
    stages = [stage_of(config, r) for r in (1, 2, 3, 4)]
    assert [s[:3] for s in stages] == [(1, 1, 2), (1, 2, 2), (2, 1, 2), (2, 2, 2)]
    assert stages[0].seed == config.seed != stages[2].seed
    plain = small_config()
    assert stage_of(plain, 2) == (1, 2, 3, 1)


def test_labels_are_asked_and_prompts_start_again(make_workspace: Callable[..., Workspace]) -> None:
    workspace = make_workspace(**ACTIVE)
    grid = InlineGrid(workspace)
    federation = Federation(workspace, grid)
    federation.join()
    with pytest.raises(UserError, match="no labelled"):
        workspace.train_data(0)
    lines = [federation.train_round(r) for r in (1, 2, 3)]
    assert [line.get("labels") for line in lines] == [
        {"active_round": 1, "clients": 4, "asked": 12},
        None,
        {"active_round": 2, "clients": 4, "asked": 24},
    ]
    assert [line["lr"] for line in lines] == [0.05, 0.025, 0.05]
    assert [line["client_steps"] for line in lines] == [2, 2, 2]
    # The messages of round 3 had the starting prompts, whatever the two rounds before had learned.
    start = workspace.method.init_shared(1)["ctx"].numpy()
    assert np.array_equal(federation._start["ctx"].numpy(), start)
    for client in range(4):
        stored = grid.private.get(client)
        assert stored is not None
        asked_N = stored[ASKED]
        assert torch.bincount(asked_N.long())[1:].tolist() == [3, 3]
        data = workspace.train_data(client, asked_N)
        assert len(data) == 6
        train = workspace.partition.train(client)[(asked_N > 0).numpy()]
        assert data.labels_N.tolist() == workspace.dataset.labels_N[train].tolist()


def test_labels_that_were_not_asked_for_change_nothing(
    make_workspace: Callable[..., Workspace],
) -> None:
    def trained(change: np.ndarray | None) -> tuple[str, list[torch.Tensor]]:
        workspace = make_workspace(**ACTIVE)
        if change is not None:
            labels_N = workspace.dataset.labels_N.copy()
            labels_N[change] = (labels_N[change] + 1) % 6
            workspace.dataset = replace(workspace.dataset, labels_N=labels_N)
        grid = InlineGrid(workspace)
        federation = Federation(workspace, grid)
        federation.join()
        for server_round in range(1, 5):
            federation.train_round(server_round)
        asked = [(grid.private.get(c) or {})[ASKED] for c in range(4)]
        return array_checksum(to_arrays(federation.arrays)), asked

    first, asked = trained(None)
    partition = make_workspace(**ACTIVE).partition
    hidden = [partition.train(c)[(asked[c] == 0).numpy()] for c in range(4)]
    assert sum(map(len, hidden)) > 20
    second, again = trained(np.concatenate(hidden))
    assert first == second
    assert all(torch.equal(a, b) for a, b in zip(asked, again, strict=True))


@pytest.mark.parametrize("method", ["promptfl", "fedpgp"])
def test_a_resumed_run_asks_for_the_same_labels(
    make_workspace: Callable[..., Workspace], tmp_path: Path, method: str
) -> None:
    keep = {"momentum_state": "keep"} if method == "fedpgp" else {}
    workspace = make_workspace(**{**ACTIVE, "method": {"name": method}, "training": keep})

    play(workspace, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        play(workspace, tmp_path / "part", StopAfter(2))
    play_on(workspace, tmp_path / "part")
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "part")]
    assert lines[0] == lines[1]
    assert [json.loads(x).get("labels", {}).get("asked") for x in lines[0].splitlines()] == [
        None, 12, None, 24, None,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"federation": {"rounds": 5}}, "active_rounds"),
        ({"protocols": ["global", "privacy_audit"]}, "privacy_audit"),
    ],
)
def test_what_cannot_be_is_refused(sections: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        small_config(**{**ACTIVE, **sections})


@pytest.mark.parametrize(
    "sections",
    [{"method": {"name": "zero_shot"}}, {"strategy": {"name": "fedadam"}}],
)
def test_what_cannot_start_again_is_refused(
    make_workspace: Callable[..., Workspace], sections: dict[str, Any]
) -> None:
    workspace = make_workspace(**{**ACTIVE, **sections})
    with pytest.raises(UserError, match="labels_per_round"):
        Federation(workspace, InlineGrid(workspace))
