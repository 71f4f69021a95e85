"""How far the runs of a sweep are, as their folders show."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedprompt.sweeps.state import progress, rounds_done, seconds_left
from tests.support.sweeps import fake_run, plan


class TestState:
    """What folders say."""

    def test_estimate_is_from_finished_runs_alike(self, tmp_path: Path) -> None:
        runs = plan(tmp_path, "federation.rounds=9")
        assert seconds_left(runs, 2) is None
        fake_run(runs[0], 10, 100.0)  # the first row and value: 100 s for its other seed
        fake_run(runs[2], 5, None)  # half done: half of the usual
        assert rounds_done(runs[2].folder) == 5
        assert progress(runs[2]).begun
        assert not progress(runs[2]).done
        # 100 + 50 + five others of 100, on one place, then on two.
        assert seconds_left(runs, 1) == pytest.approx(650)
        assert seconds_left(runs, 2) == pytest.approx(350)
        fake_run(runs[4], 10, 20.0)  # another row: 20 s for its other seed, 60 s elsewhere
        assert seconds_left(runs, 1) == pytest.approx(100 + 30 + 60 + 20 + 60 + 60)

    def test_a_folder_without_rounds_is_at_the_start(self, tmp_path: Path) -> None:
        run = plan(tmp_path)[0]
        assert progress(run) == progress(run).__class__(False, False, 0)
        assert rounds_done(tmp_path) == 0
