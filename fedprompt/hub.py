"""Whether the Hugging Face hub can be reached: probed once per process, and then said.

Without a connection, the hub's libraries try every file several times, which takes minutes, also
for files that are already on this machine.
"""

from __future__ import annotations

import functools
import logging
import os
import sys

PATIENCE_S = 5.0
"""Longest wait for the hub's first answer, seconds."""
log = logging.getLogger(__name__)


@functools.cache
def stay_offline_if_unreachable() -> bool:
    """Probe the hub, and let its libraries use only local files if it cannot be reached.

    Call this before anything that may be downloaded from the hub. Only the first call of a process
    takes time, and none does if the user has set `HF_HUB_OFFLINE`.

    Returns:
        Whether the process is offline.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return True
    # Taken from the hub's own library, so that mirrors (HF_ENDPOINT) are respected.
    problem = _probe(constants.ENDPOINT)
    if not problem:
        return False
    log.warning(
        "the model hub %s cannot be reached (%s); only files that are already on this machine are "
        "used. HF_HUB_OFFLINE=1 skips this check.",
        constants.ENDPOINT,
        problem,
    )
    # The libraries have read the variable when they were imported, and child processes will.
    os.environ["HF_HUB_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True
    datasets_config = sys.modules.get("datasets.config")
    if datasets_config is not None:
        datasets_config.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
    return True


def _probe(url: str) -> str:
    """Why a site does not answer; empty if it does, whatever it says."""
    import httpx

    try:
        # Through the proxies of the environment, as the hub's library does.
        httpx.head(url, timeout=PATIENCE_S)
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        return f"{type(error).__name__}: {error}".rstrip(": ")
    return ""
