"""What a sweep shows while it runs."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from fedprompt.sweeps.live import Board, LiveBoard, PlainBoard
from fedprompt.sweeps.plan import (
    PlannedRun,
)
from tests.support.sweeps import fake_run, plan


class TestBoard:
    """What is shown."""

    def board(self, cls: type[Board], runs: list[PlannedRun], height: int = 40) -> Board:
        console = Console(file=io.StringIO(), width=100, height=height, force_terminal=False)
        return cls(runs, 2, console)

    def said(self, board: Board) -> str:
        assert isinstance(board.console.file, io.StringIO)
        return board.console.file.getvalue()

    def test_plain_lines(self, tmp_path: Path) -> None:
        runs = plan(tmp_path)
        board = self.board(PlainBoard, runs)
        fake_run(runs[0], 2, 3.0)
        board.skip(runs[0])
        board.start(runs[1])
        fake_run(runs[1], 2, 3.0)
        board.finish(runs[1], "")
        board.start(runs[2])
        board.finish(runs[2], "no room on [the] disk")
        lines = self.said(board).splitlines()
        assert lines[0] == f"start  {runs[1].name}"
        assert lines[1].startswith(
            f"done   {runs[1].name}  global 61.2 %  personal 78.9 %  took 0:"
        )
        assert "(8 runs: 2 done, 6 waiting, about 0:09 left)" in lines[1]
        assert lines[3] == f"FAILED {runs[2].name}: no room on [the] disk"
        assert board.failures == {runs[2].name: "no room on [the] disk"}
        assert board.counts().startswith("8 runs: 2 done, 5 waiting, 1 failed")

    def test_a_trial_of_a_search_shows_its_accuracy_on_validation_images(
        self, tmp_path: Path
    ) -> None:
        runs = plan(tmp_path)
        fake_run(runs[0], 2, 3.0)
        tried = {"name": "personal", "value": 0.556}
        summary = {"wall_s": 3, "personal": None, "objective": tried}
        (runs[0].folder / "summary.json").write_text(json.dumps(summary))
        plain, live = (self.board(cls, runs) for cls in (PlainBoard, LiveBoard))
        for board in (plain, live):
            board.start(runs[0])
            board.finish(runs[0], "")
        assert isinstance(live, LiveBoard)
        live.console.print(live.table())
        assert "validation personal 55.6 %" in self.said(plain)
        assert "validation personal 55.6 %" in self.said(live)

    def test_live_table_shows_what_runs_where_room_is_short(self, tmp_path: Path) -> None:
        runs = plan(tmp_path)
        board = self.board(LiveBoard, runs, height=10)
        assert isinstance(board, LiveBoard)
        board.start(runs[6])
        board.finish(runs[5], "broken")
        board.console.print(board.table())
        shown = self.said(board)
        assert "round 0/1" in shown
        assert "failed: broken" in shown
        assert sum("-seed" in line for line in shown.splitlines()) == 4
        assert "8 runs: 1 running, 6 waiting, 1 failed" in shown

    @pytest.mark.parametrize("width", [80, 50])
    def test_live_table_cuts_no_number_and_keeps_the_end_of_a_name(
        self, tmp_path: Path, width: int
    ) -> None:
        rows = {f"{word} with a name that is far too long for a column": [] for word in "ab"}
        rows["b with a name that is far too long for a column"] = ["method=promptfl"]
        runs = plan(tmp_path, rows=rows)
        console = Console(file=io.StringIO(), width=width, height=40, force_terminal=False)
        board = LiveBoard(runs, 2, console)
        fake_run(runs[0], 2, 3.0)
        board.skip(runs[0])
        board.start(runs[1])
        board.finish(runs[2], "too few images " * 20)
        console.print(board.table())
        lines = self.said(board).splitlines()
        assert max(map(len, lines)) <= width
        (done,) = (line for line in lines if "61.2 %" in line)
        assert "78.9 %" in done
        (running,) = (line for line in lines if "round 0/1, 0:0" in line)
        assert "-seed2" in running
        assert any("failed: too" in line for line in lines)
        assert sum("seed1" in line for line in lines) == 4
