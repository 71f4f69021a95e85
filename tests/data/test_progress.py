"""Plain progress lines, without a terminal: some, and not many."""

from __future__ import annotations

import pytest

from fedprompt.data import progress


@pytest.mark.parametrize(
    ("seconds", "lines"),
    [(0.01, 0), (1.0, 9), (0.2, 2), (100.0, 99)],
    ids=["short", "a line per 10 %", "not sooner than every 10 s", "a line per minute"],
)
def test_lines_are_seldom(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], seconds: float, lines: int
) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress.progress_bar("checking flowers", 2000, visible=True) as advance:
        for _ in range(100):
            now += seconds
            advance(20)
    told = capsys.readouterr().err.splitlines()
    assert len(told) <= lines
    assert len(told) >= lines - 1
    if lines:
        assert told[0].startswith("checking flowers: ")
        assert "of 2,000" in told[0]
        assert told[0].endswith(" s left")


def test_nothing_is_told_of_what_is_not_visible(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.progress_bar("checking", 1, visible=False) as advance:
        advance(1)
    assert capsys.readouterr() == ("", "")
