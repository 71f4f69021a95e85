"""Calls of Flower's own `flwr` command, which controls the SuperLink on this machine.

Runs on the server, in `deploy server` (to register keys) and `deploy run` (to submit a run and ask
for its state).
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence

from fedprompt.errors import UserError
from fedprompt.runtime.peer_text import sanitised

TIMEOUT_S = 180.0


def run_flwr(arguments: Sequence[str], environment: Mapping[str, str]) -> str:
    """Run `flwr` and wait until it ends.

    Args:
        arguments: what follows `flwr` on the command line.
        environment: variables beyond this process's own; `FLWR_HOME` selects the SuperLink.

    Returns:
        What the command has printed, also if it has failed.

    Raises:
        UserError: the command cannot be started, or takes longer than `TIMEOUT_S`.
    """
    try:
        finished = subprocess.run(
            ["flwr", *arguments],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"cannot run 'flwr {arguments[0]}': {error}.") from None
    # Both streams, so that the caller can quote the reason of a failure.
    return finished.stdout + finished.stderr


def last_words(output: str) -> str:
    """The end of a command's output on one line, for an error message."""
    return sanitised(" ".join(output.split())[-400:]) or "it printed nothing"
