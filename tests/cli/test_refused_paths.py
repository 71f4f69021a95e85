"""A path that the operating system refuses ends a command with one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedprompt.cli.main import main

LONG = "x" * 300


@pytest.mark.parametrize(
    "arguments",
    [
        ["report", LONG],
        ["compare", LONG],
        ["predict", LONG, "a.png"],
        ["export", LONG],
        ["run", "--resume", LONG],
        ["data", "show", "quickstart", "--out", f"{LONG}.png"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_name_that_is_too_long(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["fedprompt", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("fedprompt: ")
    assert error.count("\n") == 1
