"""When personal models are tested on the server's test images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedprompt.federation import common_evaluation
from fedprompt.federation.common_evaluation import KEY, CommonTest, Positions, decide
from fedprompt.federation.registry import strategy_class
from fedprompt.federation.server_app import Federation
from fedprompt.messages import to_record
from fedprompt.simulation.inline_grid import InlineGrid
from fedprompt.workspace import Workspace

Make = Callable[..., Workspace]
IMAGES = [36] * 4


def decided(workspace: Workspace, name: str = "fedavg") -> CommonTest:
    cls = strategy_class(name)
    return decide(workspace, cls(cls.Config(), shapes=workspace.shared_shapes, seed=1), IMAGES)


def rounds(test: CommonTest) -> list[int]:
    """The rounds of six in which the test takes place."""
    return [r for r in range(7) if test.due(r, last=r == 6)]


@pytest.mark.parametrize(
    ("every", "expected"), [(None, list(range(7))), (1, list(range(7))), (4, [0, 4, 6]), (0, [6])]
)
@pytest.mark.parametrize("method", ["promptfl", "fedrsclip"])
def test_the_key_says_in_which_rounds(
    make_workspace: Make, method: str, every: int | None, expected: list[int]
) -> None:
    evaluation = {"personal_on_global_every": every}
    test = decided(make_workspace(method={"name": method}, evaluation=evaluation))
    assert rounds(test) == expected
    assert test.is_global == (method == "promptfl")
    assert "evaluation.personal_on_global" in test.note


@pytest.mark.parametrize(
    "sections",
    [{"evaluation": {"personal_on_global": False}}, {"protocols": ["global"]}],
)
def test_nothing_is_decided_where_nothing_is_asked(
    make_workspace: Make, sections: dict[str, Any]
) -> None:
    assert decided(make_workspace(**sections)) == CommonTest()


def test_clients_that_are_sent_their_own_tensors_are_asked(make_workspace: Make) -> None:
    workspace = make_workspace(method={"name": "promptfl"})
    assert decided(workspace).is_global
    assert not decided(workspace, "clustered").is_global


# Training costs 3 passes x 4 clients x (36 images and 5 batches of 8): 3 x 4 x 41 = 492 positions a
# round at one position per image and batch, and 3 rounds three times as much. A test of 4 models
# costs 4 x the server's images x the positions of each.
@pytest.mark.parametrize(
    ("models", "expected", "key"),
    [(492, list(range(7)), KEY), (493, [6], f"{KEY}=1"), (1476, [6], ""), (1477, [], f"{KEY}=0")],
)
def test_a_test_may_cost_what_the_training_costs(
    make_workspace: Make,
    monkeypatch: pytest.MonkeyPatch,
    models: int,
    expected: list[int],
    key: str,
) -> None:
    monkeypatch.setattr(common_evaluation, "FREE_POSITIONS", 0)
    workspace = make_workspace()
    tests = len(workspace.partition.server_test)
    # Scaled, so that a test costs `models` where training costs 492.
    scale = 4 * tests
    counted = Positions(model=scale, image=scale, private=models)
    monkeypatch.setattr(common_evaluation, "count_positions", lambda _: counted)
    test = decided(workspace)
    assert rounds(test) == expected
    assert key in test.note


def test_small_tests_are_always_affordable(
    make_workspace: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Positions(model=1, image=1, private=1000)
    monkeypatch.setattr(common_evaluation, "count_positions", lambda _: counted)
    assert rounds(decided(make_workspace())) == list(range(7))


def test_rounds_without_the_test_say_nothing_about_it(make_workspace: Make) -> None:
    workspace = make_workspace(evaluation={"personal_on_global_every": 2})
    federation = Federation(workspace, InlineGrid(workspace))
    federation.join()
    lines = [federation.evaluate(server_round) for server_round in range(4)]
    tested = [line["personal_on_global"] is not None for line in lines]
    assert tested == [True, False, True, True]  # round 3 is the last
    assert all(line["personal"] for line in lines)


def test_nodes_with_folders_of_their_own_are_not_asked(make_workspace: Make) -> None:
    class Nodes(Federation):
        clients_hold_server_test = False

    workspace = make_workspace(method={"name": "promptfl"})
    federation = Nodes(workspace, InlineGrid(workspace))
    federation.join()
    line = federation.evaluate(0)
    assert line["personal_on_global"] is None
    assert line["global"]
    assert line["personal"]


def test_a_model_that_has_diverged_marks_all_clients(make_workspace: Make) -> None:
    workspace = make_workspace(method={"name": "promptfl"})
    federation = Federation(workspace, InlineGrid(workspace))
    federation.join()
    # Finite tensors, as clients accept no others, whose class features are not.
    huge = {n: torch.full(shape, 3e38).numpy() for n, shape in workspace.shared_shapes.items()}
    federation.arrays = to_record(huge)
    everyone = list(range(workspace.num_clients))
    line = federation.evaluate(0)
    assert line["global"]["unanswered"]
    assert line["personal_on_global"]["not_finite"] == everyone


def test_no_private_tensor_reaches_the_memo(make_workspace: Make) -> None:
    """Each client is one block, and gets the score of its own model."""
    workspace = make_workspace(simulation={"clients_per_block": 1})
    federation = Federation(workspace, InlineGrid(workspace))
    federation.join()
    federation.train_round(1)
    assert not workspace.memo._held
    # Without any client: all that is held belongs to the global model.
    federation.evaluate(1, clients=[])
    held = set(workspace.memo._held)
    assert held
    assert federation.evaluate(1)["personal"]["clients_tested"] == workspace.num_clients
    assert set(workspace.memo._held) == held
