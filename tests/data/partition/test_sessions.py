"""Class-incremental sessions: what exists in each of them, and what a run trains on when."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprompt.config.schema import PartitionConfig
from fedprompt.data.partition.sessions import bounds, in_session
from fedprompt.data.partition.stages import stage_of
from fedprompt.errors import UserError
from fedprompt.federation.server_app import Federation
from fedprompt.files.tensors import array_checksum
from fedprompt.messages import to_arrays
from fedprompt.simulation.inline_grid import InlineGrid
from fedprompt.workspace import Workspace
from tests.support.builders import small_config
from tests.support.displays import StopAfter
from tests.support.recorded_runs import play, play_on

INCREMENTAL: dict[str, Any] = {
    "method": {"name": "promptfl", "context_tokens": 2},
    "partition": {"sessions": 3},
    "federation": {"rounds": 6},
    "protocols": ["global", "personalised", "class_incremental"],
}


@pytest.mark.parametrize(
    ("sessions", "share", "classes", "ends"),
    [
        (3, 0.0, 6, [2, 4, 6]),
        (3, 0.0, 7, [3, 5, 7]),
        (3, 0.5, 6, [3, 5, 6]),
        (2, 0.55, 20, [11, 20]),
    ],
)
def test_every_class_is_in_one_session(
    sessions: int, share: float, classes: int, ends: list[int]
) -> None:
    options = PartitionConfig(sessions=sessions, first_session_share=share)
    assert bounds(options, classes) == list(zip([0, *ends], ends, strict=False))


@pytest.mark.parametrize("options", [{"sessions": 6}, {"sessions": 3, "first_session_share": 0.9}])
def test_sessions_without_classes_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="sessions"):
        bounds(PartitionConfig(**options), 6)


def test_a_session_has_its_own_training_images_and_tests_of_all_seen(
    make_workspace: Callable[..., Workspace],
) -> None:
    whole = make_workspace(**INCREMENTAL)
    labels_N, trained = whole.dataset.labels_N, []
    for session in (1, 2, 3):
        present = whole.at(2 * session)
        assert present is whole.at(2 * session - 1)
        assert present.task.class_names == whole.task.class_names[: 2 * session]
        images = present.partition.train_flat
        trained += images.tolist()
        assert set(labels_N[images]) == {2 * session - 2, 2 * session - 1}
        assert present.server_test()[1].tolist() == [
            label for label in labels_N[whole.partition.server_test] if label < 2 * session
        ]
        for client in range(4):
            own = whole.partition.test(client)
            expected = own[labels_N[own] < 2 * session].tolist()
            assert present.partition.test(client).tolist() == expected
    assert sorted(trained) == sorted(whole.partition.train_flat.tolist())
    assert whole.at(0) is not whole
    plain = make_workspace()
    assert plain.at(0) is plain.at(3) is plain


def test_later_sessions_have_few_images_of_each_class(
    make_workspace: Callable[..., Workspace],
) -> None:
    options = {"sessions": 2, "session_shots": 1}
    whole = make_workspace(**{**INCREMENTAL, "partition": options})
    full, few = whole.at(1).partition, whole.at(4).partition
    labels_N = whole.dataset.labels_N
    counts_KC = few.train_counts(labels_N, 6)
    held_KC = whole.partition.train_counts(labels_N, 6)
    assert np.array_equal(full.train_counts(labels_N, 6)[:, :3], held_KC[:, :3])
    assert np.array_equal(counts_KC[:, 3:], np.minimum(held_KC[:, 3:], 1))
    again = make_workspace(**{**INCREMENTAL, "partition": options}).at(4).partition
    assert np.array_equal(few.train_flat, again.train_flat)


def test_a_session_that_nobody_can_train_in_is_refused(
    make_workspace: Callable[..., Workspace],
) -> None:
    whole = make_workspace(**INCREMENTAL)
    nobody = whole.partition.restricted(
        whole.dataset.labels_N < 4, np.ones(len(whole.dataset), dtype=bool)
    )
    with pytest.raises(UserError, match="session 3"):
        in_session(whole.config.partition, whole.dataset, nobody, 3, 1)


def test_later_classes_change_nothing_and_only_holders_train(
    make_workspace: Callable[..., Workspace],
) -> None:
    def trained(last: int, change: int | None = None) -> tuple[str, list[dict[str, Any]]]:
        whole = make_workspace(**INCREMENTAL)
        if change is not None:
            labels_N = whole.dataset.labels_N.copy()
            held = np.zeros(len(labels_N), dtype=bool)
            held[whole.partition.train_flat] = True
            labels_N[held & (labels_N >= change)] = change
            whole.dataset = replace(whole.dataset, labels_N=labels_N)
        grid = InlineGrid(whole)
        federation = Federation(make_workspace(**INCREMENTAL), grid)
        federation.join()
        lines = []
        for server_round in range(1, last + 1):
            lines.append(federation.train_round(server_round))
            able = set(federation.workspace.at(server_round).trainable)
            assert set(federation.strategy.sampled) == able
        return array_checksum(to_arrays(federation.arrays)), lines

    first, lines = trained(4)
    assert [line["lr"] for line in lines] == [0.05, 0.025, 0.05, 0.025]
    # The prompts of session 1 go on into session 2.
    assert trained(2)[0] != first
    assert trained(4, change=4)[0] == first
    assert trained(4, change=3)[0] != first


def test_seeds_of_sessions_differ() -> None:
    config = small_config(**INCREMENTAL)
    stages = [stage_of(config, r) for r in (1, 2, 3, 6)]
    assert [s[:3] for s in stages] == [(1, 1, 2), (1, 2, 2), (2, 1, 2), (3, 2, 2)]
    assert stages[0].seed == config.seed != stages[2].seed


def test_a_resumed_run_goes_on_in_its_session(
    make_workspace: Callable[..., Workspace], tmp_path: Path
) -> None:
    sections = {**INCREMENTAL, "federation": {"rounds": 6, "fraction": 0.5}}
    workspace = make_workspace(**sections)

    whole = play(workspace, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        play(workspace, tmp_path / "part", StopAfter(3))
    part = play_on(workspace, tmp_path / "part")
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "part")]
    assert lines[0] == lines[1]
    assert whole.asked == part.asked


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"federation": {"rounds": 5}}, "rounds=5"),
        ({"evaluation": {"every": 4}}, "every=4"),
        ({"partition": {"sessions": 0}}, "sessions"),
        ({"partition": {"sessions": 1}}, "sessions"),
        ({"protocols": ["global"]}, "class_incremental"),
        ({"protocols": [*INCREMENTAL["protocols"], "unlearning"]}, "unlearning"),
        (
            {"partition": {"sessions": 3, "labels_per_round": 2, "active_rounds": 2}},
            "labels_per_round",
        ),
        ({"attack": {"kind": "label_flip"}}, "label_flip"),
        ({"method": {"name": "rebapl"}, "strategy": {"name": "auto"}}, "rebapl"),
    ],
)
def test_what_cannot_be_is_refused(sections: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        small_config(**{**INCREMENTAL, **sections})


@pytest.mark.parametrize("name", ["zero_shot", "coop_csc", "palm"])
def test_methods_that_cannot_go_on_with_further_classes_are_refused(
    make_workspace: Callable[..., Workspace], name: str
) -> None:
    sections = {**INCREMENTAL, "method": {"name": name}, "strategy": {"name": "auto"}}
    workspace = make_workspace(**sections)
    with pytest.raises(UserError, match=f"'{name}'.*further classes"):
        Federation(workspace, InlineGrid(workspace))
