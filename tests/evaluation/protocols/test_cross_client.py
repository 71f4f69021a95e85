"""Every personal model on every client's test images, by hand and in a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedprompt.deploy.node_config import on_server
from fedprompt.errors import UserError
from fedprompt.evaluation.protocols.cross_client import CrossClient, own_and_others
from fedprompt.experiment.compose import compose
from fedprompt.reports.run_data import load_run
from tests.support.protocol_runs import summary_of


def test_the_diagonal_is_the_personal_accuracy(runs: Callable[..., Path]) -> None:
    folder = runs("cross_client")
    summary = summary_of(folder)
    part = summary["protocols"]["cross_client"]
    matrix = np.array(part["accuracy"])
    personal = dict(
        zip(summary["personal"]["clients"], summary["personal"]["accuracy"], strict=True)
    )
    for row, model in enumerate(part["models"]):
        assert matrix[row, part["targets"].index(model)] == pytest.approx(personal[model])
    assert part["personal"]["own"] == pytest.approx(summary["personal"]["mean"])
    off = matrix[np.array(part["models"])[:, None] != np.array(part["targets"])]
    assert part["personal"]["others"] == pytest.approx(off.mean())
    # Zero-shot is the same model on every client, so its mean is that of the run's summary.
    assert np.mean(part["common"]["zero-shot"]) == pytest.approx(
        summary["zero_shot"]["personal"]["mean"]
    )
    assert len(CrossClient.table(part).rows) == 3
    figure = CrossClient.figure(part, load_run(folder))
    assert len(figure.panels[0].cells) == len(part["models"]) + 2


def test_the_summary_by_hand() -> None:
    matrix = np.array([[1.0, 0.5, 0.2], [0.0, 0.8, 0.3]])
    found = own_and_others(matrix, [0, 1], [0, 1, 2])
    assert found["own"] == pytest.approx(0.9)
    assert found["others"] == pytest.approx(0.25)
    assert found["difference"] == pytest.approx(0.65)
    assert found["lowest"] == 0
    nothing = own_and_others(np.zeros((0, 0)), [], [])
    assert set(nothing.values()) == {None}


def test_of_many_clients_some_are_drawn_the_same_everywhere(runs: Callable[..., Path]) -> None:
    folder = runs("cross_client", protocol_options={"cross_client": {"clients": 2}})
    part = summary_of(folder)["protocols"]["cross_client"]
    assert len(part["targets"]) == 2
    assert set(part["models"]) <= set(part["targets"])


def test_a_deployment_refuses_it() -> None:
    config = compose("quickstart")
    with pytest.raises(UserError, match="cross_client"):
        on_server(replace(config, protocols=["global", "cross_client"]))
