"""A client can put any numbers under its masks; a sum that shows it is not used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedprompt.privacy.secure_aggregation import client
from fedprompt.privacy.secure_aggregation.vector import (
    Implausible,
    check_sum,
    encode,
)
from tests.support.secure_rounds import ON, PROMPTFL, MakeWorkspace, federation_of, values

WEIGHT, CUT, LOSS = -3, -2, -1
LEVELS = 2**28


def honest(weights: Any, changes: Any, losses: Any) -> Any:
    """The sum of honest clients' vectors of one number each."""
    total = np.zeros(4)
    for weight, change, loss in zip(weights, changes, losses, strict=True):
        received = {"a": np.zeros(1, np.float32)}
        trained = {"a": np.full(1, change, np.float32)}
        total += encode(received, trained, weight=weight, loss=loss, clip=1.0, levels=LEVELS)[0]
    return total


@pytest.mark.parametrize("weights", [[1e-3] * 3, [1.0] * 3, [1e-3, 0.5, 1.0]])
@pytest.mark.parametrize("change", [0.0, 1.0, -1.0, 9.0, 1 / 3])
def test_every_sum_of_honest_clients_is_plausible(weights: list[float], change: float) -> None:
    losses = [100.0, 1e9, float("nan")]
    total = honest(weights, [change] * 3, losses)
    check_sum(total, clients=3, levels=LEVELS, lightest=min(weights))


@pytest.mark.parametrize(
    "total",
    [
        [0.0, 0.0, 0.0, 0.0],
        [0.0, -1.0, 0.0, 0.0],
        [0.0, 1e-9, 0.0, 0.0],
        [0.0, 0.2, 0.0, 0.0],
        [0.0, 3.1, 0.0, 0.0],
        [0.6, 0.5, 0.0, 0.0],
        [-0.6, 0.5, 0.0, 0.0],
        [0.0, 0.5, 0.0, 0.6],
        [0.0, 0.5, -1.0, 0.0],
        [0.0, 0.5, 4.0, 0.0],
        [float("nan"), 0.5, 0.0, 0.0],
        [0.0, float("nan"), 0.0, 0.0],
    ],
    ids=str,
)
def test_implausible_sums_are_refused(total: list[float]) -> None:
    with pytest.raises(Implausible):
        check_sum(np.array(total), clients=3, levels=LEVELS, lightest=0.1)


def negative_weight(vector: Any, others: float) -> None:
    vector[WEIGHT] = -1.0


def weights_that_cancel(vector: Any, others: float) -> None:
    vector[WEIGHT] = 1e-4 - others


def weights_that_are_nothing(vector: Any, others: float) -> None:
    vector[WEIGHT] = -others


def change_beyond_its_weight(vector: Any, others: float) -> None:
    vector[:WEIGHT] = 1.0


def loss_beyond_its_weight(vector: Any, others: float) -> None:
    vector[LOSS] = -1.0


def cut_less_than_never(vector: Any, others: float) -> None:
    vector[CUT] = -1.0


@pytest.mark.parametrize(
    "attack",
    [
        negative_weight,
        weights_that_cancel,
        weights_that_are_nothing,
        change_beyond_its_weight,
        loss_beyond_its_weight,
        cut_less_than_never,
    ],
)
def test_a_bad_number_voids_the_round_and_not_the_run(
    make_workspace: MakeWorkspace,
    monkeypatch: pytest.MonkeyPatch,
    attack: Callable[[Any, float], None],
) -> None:
    workspace = make_workspace(method=PROMPTFL, secure_aggregation={**ON, "max_weight": 1000})
    federation, _ = federation_of(workspace)
    start = values(federation)
    others = sum(len(workspace.partition.train(c)) for c in (0, 2, 3)) / 1000
    calls: list[int] = []

    def encoded(*arguments: Any, **options: Any) -> Any:
        vector, cut = encode(*arguments, **options)
        # The clients answer one after the other, and client 1 is the attacker.
        if len(calls) % 4 == 1:
            attack(vector, others)
        calls.append(len(calls))
        return vector, cut

    monkeypatch.setattr(client, "encode", encoded)
    line = federation.train_round(1)
    assert line["secure"]["void"].startswith("a client has sent something wrong")
    assert line["train"] is None
    assert (values(federation) == start).all()
    monkeypatch.undo()
    assert "void" not in federation.train_round(2)["secure"]
    assert (values(federation) != start).any()


def test_clients_that_count_alike_cannot_weigh_more(
    make_workspace: MakeWorkspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("dp_accounting", reason="needs the extra 'dp'")
    workspace = make_workspace(
        method=PROMPTFL, secure_aggregation=ON, privacy={"noise": 1.0, "clip": 0.01}
    )
    federation, _ = federation_of(workspace)

    def encoded(*arguments: Any, **options: Any) -> Any:
        vector, cut = encode(*arguments, **options)
        vector[WEIGHT] = 0.5
        return vector, cut

    monkeypatch.setattr(client, "encode", encoded)
    assert "weights" in federation.train_round(1)["secure"]["void"]
