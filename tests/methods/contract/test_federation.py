"""What every method promises in a federation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord

from fedprompt.config.schema import Config
from fedprompt.experiment.checkpoint import read_checkpoint
from fedprompt.experiment.display import QuietDisplay
from fedprompt.experiment.rounds import run_server
from fedprompt.experiment.run_folder import RunFolder
from fedprompt.federation.checkpoint import Checkpoint
from fedprompt.federation.server_app import Federation
from fedprompt.messages import ARRAYS
from fedprompt.methods.base import Method, uploaded_numbers
from fedprompt.reports.run_data import CHECKPOINT, PRIVATE
from fedprompt.simulation.inline_grid import InlineGrid
from fedprompt.simulation.private_log import PrivateLog
from fedprompt.workspace import Workspace
from tests.support.method_contract import (
    shapes,
)


class Spying(InlineGrid):
    """Keeps every train reply."""

    replies: list[Message]

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
        replies = list(super().send_and_receive(messages, timeout=timeout))
        self.replies = getattr(self, "replies", []) + replies
        return replies


def test_only_declared_shared_tensors_leave_a_client(
    trainable: Method, workspace: Workspace
) -> None:
    grid = Spying(workspace)
    federation = Federation(workspace, grid)
    federation.join()
    for server_round in (1, 2):
        federation.train_round(server_round)
    expected = shapes(trainable.init_shared(1))
    trained = [r for r in grid.replies if ARRAYS in r.content]
    assert len(trained) == 4, "two of three clients in two rounds"
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


class StopAfter(QuietDisplay):
    """Interrupts a run when a round is recorded."""

    def __init__(self, server_round: int) -> None:
        self.last = server_round

    def round(self, line: Mapping[str, Any], eta_s: float) -> None:
        if line["round"] == self.last:
            raise KeyboardInterrupt


def test_resume_goes_on_bit_for_bit(
    trainable: Method, workspace: Workspace, tmp_path: Path
) -> None:
    def run(folder: RunFolder, display: QuietDisplay, checkpoint: Any = None) -> None:
        private = PrivateLog(folder.path / PRIVATE, 3)
        federation = Federation(workspace, InlineGrid(workspace, private))
        try:
            run_server(federation, folder, display, checkpoint, private)
        finally:
            folder.close()

    def into(name: str) -> Config:
        output = replace(workspace.config.output, dir=str(tmp_path / name))
        return replace(workspace.config, output=output)

    run(RunFolder.create(into("whole")), QuietDisplay())
    with pytest.raises(KeyboardInterrupt):
        run(RunFolder.create(into("part")), StopAfter(2))
    run(RunFolder.resume(tmp_path / "part")[0], QuietDisplay(), read(tmp_path / "part"))
    ours, theirs = read(tmp_path / "part"), read(tmp_path / "whole")
    for mine, other in ((ours.shared, theirs.shared), (ours.strategy, theirs.strategy)):
        assert mine.keys() == other.keys()
        for n, t in other.items():
            assert torch.equal(mine[n], t), n
    lines = [(tmp_path / n / "metrics.jsonl").read_text() for n in ("part", "whole")]
    assert lines[0] == lines[1]


def read(folder: Path) -> Checkpoint:
    return read_checkpoint(folder / CHECKPOINT)
