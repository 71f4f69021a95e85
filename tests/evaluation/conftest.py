"""Runs with protocols that several test files read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedprompt.experiment.display import QuietDisplay
from fedprompt.experiment.run import run
from fedprompt.reports import run_report
from tests.support.protocol_runs import (
    config_of,
    silent,
)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A finished run with these protocols; each combination is run once.

    Only the protocols' own figures are drawn: the others take half the time of a run.
    """
    made: dict[str, Path] = {}

    def make(*names: str, **sections: Any) -> Path:
        key = json.dumps([names, sections])
        if key not in made:
            config = config_of(*names, **sections)
            folder = tmp_path_factory.mktemp("run") / "run"
            config = replace(config, output=replace(config.output, dir=str(folder), report=True))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(run_report, "run_figures", lambda run: [])
                made[key] = run(config, QuietDisplay(silent()))
        return made[key]

    return make
