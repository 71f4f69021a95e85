"""Fonts for names in scripts that matplotlib's own font lacks, such as Chinese class names."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedprompt.reports.figure import Figure

OWN = "DejaVu Sans"
"""The font that comes with matplotlib."""
log = logging.getLogger(__name__)
_said: set[str] = set()


@contextlib.contextmanager
def fonts_for(figure: Figure) -> Iterator[None]:
    """Draw with fonts that have every letter of a figure, as far as there are any.

    Letters that no installed font has are named in one warning, once per process.
    """
    letters = {letter for text in _texts(figure) for letter in text if letter.isprintable()}
    missing = letters - _letters(_path_of(OWN)) if any(map(_is_rare, letters)) else set()
    if not missing:
        yield
        return
    families, absent = _covering(frozenset(missing))
    if absent - _said:
        _said.update(absent)
        log.warning(
            "no installed font has the letters %s; plots show boxes in their place. Install a font "
            "that has them, e.g. Noto Sans CJK for Chinese, Japanese and Korean.",
            "".join(sorted(absent))[:20],
        )
    from matplotlib import rc_context

    with rc_context({"font.family": [OWN, *families]}), warnings.catch_warnings():
        # Matplotlib warns of every missing letter at every size.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def _is_rare(letter: str) -> bool:
    """Whether a letter may be missing: reading a font's list of letters takes a while."""
    return ord(letter) > 0x2FF


def _texts(part: Any) -> Iterator[str]:
    """All texts in a description, at any depth."""
    if isinstance(part, str):
        yield part
    elif dataclasses.is_dataclass(part):
        for field in dataclasses.fields(part):
            yield from _texts(getattr(part, field.name))
    elif isinstance(part, Mapping):
        yield from _texts([*part.keys(), *part.values()])
    elif isinstance(part, Sequence):
        for item in part:
            yield from _texts(item)


@functools.cache
def _covering(missing: frozenset[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Installed font families that have the missing letters, and the letters that none has."""
    from matplotlib import font_manager

    families: list[str] = []
    left = set(missing)
    # Regular faces come last, so that they stand for their family: others have fewer letters.
    listed = sorted(
        font_manager.fontManager.ttflist,
        key=lambda entry: (entry.style == "normal", entry.weight in (400, "normal")),
    )
    # The font "Last Resort" has a box for every letter there is.
    entries = {e.name: e.fname for e in listed if not e.name.startswith("Last Resort")}
    for name, path in sorted(entries.items()):
        if not left:
            break
        # A font that is listed may have been removed since, or be of a kind that is not read.
        with contextlib.suppress(OSError, RuntimeError):
            found = left & _letters(path)
            if found:
                families.append(name)
                left -= found
    return tuple(families), frozenset(left)


def _path_of(family: str) -> str:
    from matplotlib import font_manager

    return str(font_manager.findfont(font_manager.FontProperties(family=[family])))


@functools.cache
def _letters(path: str) -> frozenset[str]:
    """The letters that a font has."""
    from matplotlib import font_manager

    return frozenset(map(chr, font_manager.get_font(path).get_charmap()))
