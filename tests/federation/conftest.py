"""Messages of these tests come from the server."""

from __future__ import annotations

import pytest

from fedprompt.messages import become_server


@pytest.fixture(autouse=True)
def _server() -> None:
    become_server()
