"""What every method promises in a federation."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord

from fedprompt.experiment.checkpoint import read_checkpoint
from fedprompt.experiment.display import QuietDisplay
from fedprompt.experiment.rounds import run_server
from fedprompt.experiment.run_folder import RunFolder
from fedprompt.federation.checkpoint import Checkpoint
from fedprompt.federation.server_app import Federation
from fedprompt.messages import ARRAYS
from fedprompt.methods.base import Method, uploaded_numbers
from fedprompt.reports.run_data import CHECKPOINT, METRICS, PRIVATE
from fedprompt.simulation.inline_grid import InlineGrid
from fedprompt.simulation.private_log import PrivateLog
from fedprompt.workspace import Workspace
from tests.support.method_contract import shapes


class Spying(InlineGrid):
    """Keeps every reply."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.replies: list[Message] = []

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
        replies = list(super().send_and_receive(messages, timeout=timeout))
        self.replies += replies
        return replies


class CopyAfter(QuietDisplay):
    """Copies the run folder after a round, as a process that is killed there leaves it."""

    def __init__(self, server_round: int, folder: Path, copy: Path) -> None:
        self.last, self.folder, self.copy = server_round, folder, copy

    def round(self, line: Mapping[str, Any], eta_s: float) -> None:
        if line["round"] == self.last:
            shutil.copytree(self.folder, self.copy)


class Run(NamedTuple):
    """Three rounds of two of three clients: the run, and what was there after two rounds."""

    whole: Path
    part: Path
    replies: list[Message]


def continued(workspace: Workspace, folder: RunFolder, display: QuietDisplay) -> list[Message]:
    """Run the rounds that a folder lacks, and return all replies."""
    private = PrivateLog(folder.path / PRIVATE, 3)
    grid = Spying(workspace, private)
    try:
        run_server(Federation(workspace, grid), folder, display, folder.load_checkpoint(), private)
    finally:
        folder.close()
    return grid.replies


@pytest.fixture(scope="module")
def run(trainable: Method, workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp(trainable.name)
    whole, part = root / "whole", root / "part"
    output = replace(workspace.config.output, dir=str(whole))
    folder = RunFolder.create(replace(workspace.config, output=output))
    return Run(whole, part, continued(workspace, folder, CopyAfter(2, whole, part)))


def test_only_declared_shared_tensors_leave_a_client(trainable: Method, run: Run) -> None:
    expected = shapes(trainable.init_shared(1))
    trained = [r for r in run.replies if ARRAYS in r.content]
    assert len(trained) == 6, "two of three clients in three rounds"
    for reply in trained:
        record = reply.content[ARRAYS]
        assert isinstance(record, ArrayRecord)
        sent = {n: a.numpy() for n, a in record.items()}
        assert {n: a.shape for n, a in sent.items()} == expected
        assert sum(a.size for a in sent.values()) == uploaded_numbers(trainable)
        others = [v for n, v in reply.content.items() if n != ARRAYS]
        assert all(isinstance(v, (MetricRecord, ConfigRecord)) for v in others)
        for other in others:
            assert sum(len(v) if isinstance(v, list) else 1 for v in other.values()) < 20


def test_resume_goes_on_bit_for_bit(run: Run, workspace: Workspace) -> None:
    assert read(run.part).server_round == 2
    replies = continued(workspace, RunFolder.resume(run.part)[0], QuietDisplay())
    assert sum(ARRAYS in r.content for r in replies) == 2, "it trains the last round only"
    ours, theirs = read(run.part), read(run.whole)
    for mine, other in ((ours.shared, theirs.shared), (ours.strategy, theirs.strategy)):
        assert mine.keys() == other.keys()
        for n, t in other.items():
            assert torch.equal(mine[n], t), n
    assert (run.part / METRICS).read_text() == (run.whole / METRICS).read_text()


def read(folder: Path) -> Checkpoint:
    return read_checkpoint(folder / CHECKPOINT)
