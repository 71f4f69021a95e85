"""What the scores of runs are called: accuracy, or mAP where an image has several labels.

Results have the same keys whichever score they are, and tables and figures are worded for accuracy.
`called` puts the name of the score in its place.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar, cast

T = TypeVar("T")
ACCURACY, PRECISION = "accuracy", "mAP"
WORDED = {"title", "caption", "note", "columns", "label", "noun", "x", "y", "panels"}
"""Fields of tables and figures that we word. Names of files, runs and classes stay as they are."""
_WORD = re.compile(r"\baccurac(?:y|ies)\b", re.IGNORECASE)


def one_name(scores: Iterable[str]) -> str:
    """The name of the scores of several runs.

    Args:
        scores: what the score of each run is called.
    """
    # Sorted, so that the same runs are described in the same words in any order.
    return " or ".join(sorted(set(scores))) or ACCURACY


def called(score: str, item: T) -> T:
    """The same text, table or figure, with the name of the score for the word accuracy.

    Args:
        score: what `one_name` returned.
        item: a text, a dataclass of `figure.py` or `format.py`, or a sequence of them.
    """
    return item if score == ACCURACY else cast("T", _called(score, item))


def _called(score: str, item: Any) -> Any:
    if isinstance(item, str):
        return _WORD.sub(lambda found: score if found[0][0] == "a" else capital(score), item)
    if isinstance(item, (list, tuple)):
        return type(item)(_called(score, one) for one in item)
    if is_dataclass(item) and not isinstance(item, type):
        worded = [field.name for field in fields(item) if field.name in WORDED]
        return replace(item, **{name: _called(score, getattr(item, name)) for name in worded})
    return item


def capital(score: str) -> str:
    """The name of a score at the beginning of a sentence; mAP has a small letter there too."""
    return score if score.startswith(PRECISION) else score[:1].upper() + score[1:]
