"""Names in other scripts: drawn where a font has them, and else one line says what is missing."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytest

from fedprompt.reports import fonts
from fedprompt.reports.draw import draw, save
from fedprompt.reports.figure import Axis, Curve, Figure, Lines

CHINESE = "\u68ee\u6797"  # forest


def named(name: str) -> Figure:
    axis = Axis(label="Round", format="count")
    curves = [Curve(name=name, color="own", x=[0, 1], y=[0.5, 0.9])]
    panel = Lines(curves=curves, levels=[], x=axis, y=axis)
    return Figure(name="x", title="Title", caption="A caption.", panels=[panel])


def families(figure: Figure) -> list[str]:
    legend = draw(figure).axes[0].get_legend()
    assert legend is not None
    return list(legend.get_texts()[0].get_fontfamily())


def test_a_letter_is_drawn_in_an_installed_font_that_has_it(tmp_path: Path) -> None:
    own = fonts._letters(fonts._path_of(fonts.OWN))
    # STIX comes with matplotlib, too, and has letters that the usual font lacks.
    others = fonts._letters(fonts._path_of("STIXGeneral"))
    letter = next(c for c in sorted(others - own) if c.isprintable() and c > "\u1000")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(named(f"caf\u00e9 {letter}"), tmp_path / "x.png")
    assert len(families(named(letter))) > 1
    assert letter in fonts._letters(fonts._path_of(families(named(letter))[1]))
    assert fonts.OWN not in families(named("caf\u00e9"))[1:]


def test_what_no_font_has_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fonts, "_covering", lambda missing: ((), missing))
    monkeypatch.setattr(fonts, "_said", set())
    caplog.set_level(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(named(CHINESE), tmp_path / "x.png")
        save(named(CHINESE[0]), tmp_path / "y.png")
    (record,) = caplog.records
    assert all(letter in record.getMessage() for letter in CHINESE)
    assert "Noto Sans CJK" in record.getMessage()
