"""Whatever ends the server app is in the run's log and on the terminal."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict

from fedprompt.config.schema import to_yaml
from fedprompt.deploy import server_app
from fedprompt.deploy.submission import Submission
from fedprompt.deploy.submit import LOG, conclude
from fedprompt.errors import UserError
from fedprompt.experiment.display import QuietDisplay
from tests.support.builders import small_config

EVIL = "\x1b[2J\r\n" + "x" * 10**6


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """The handlers that the server app adds are those of its own process."""
    logger = logging.getLogger("fedprompt")
    before, level = list(logger.handlers), logger.level
    yield
    for handler in set(logger.handlers) - set(before):
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(level)


def run_app(folder: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> str:
    """Run the app; the rounds raise `error`. Returns the run's log."""

    def rounds(*_: Any) -> None:
        raise error

    config = to_yaml(small_config(output={"dir": str(folder)}))
    monkeypatch.setattr(server_app, "_run", rounds)
    monkeypatch.setattr(
        server_app, "read_submission", lambda run: Submission(config, run, "", registered={})
    )
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(),
                      run_config={"run": "0123"})  # fmt: skip
    with pytest.raises(type(error)):
        server_app.main(None, context)  # type: ignore[arg-type]
    return (folder / LOG).read_text()


@pytest.mark.parametrize("error", [KeyError("correct"), ValueError(EVIL), RecursionError("deep")])
def test_an_unexpected_error_is_logged_with_its_traceback(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    error: Exception,
) -> None:
    text = run_app(tmp_path / "run", monkeypatch, error)
    assert "Traceback" in text
    assert type(error).__name__ in text.splitlines()[-1]
    assert all(line.isprintable() for line in text.splitlines())
    assert len(text) < 20_000
    assert type(error).__name__ in capfd.readouterr().err
    with pytest.raises(UserError, match=type(error).__name__):
        conclude(tmp_path / "run", QuietDisplay(), "again", tmp_path / "logs")


def test_a_users_error_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = run_app(tmp_path / "run", monkeypatch, UserError("min_nodes is 9."))
    assert text.count("\n") == 1
    assert "min_nodes is 9." in text
