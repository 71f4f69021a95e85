"""The one line with which a user's mistake is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fedprompt.errors import UserError


def refused(call: Callable[[], Any]) -> str:
    """The one line that `call` is refused with."""
    with pytest.raises(UserError) as caught:
        call()
    line = str(caught.value)
    assert line.isprintable(), f"more than one plain line: {line!r}"
    assert line == line.strip()
    for foreign in ("Traceback", "Error(", "<class", "object at 0x", "omegaconf", "full_key"):
        assert foreign not in line
    return line
