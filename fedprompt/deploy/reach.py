"""Whether the server can be reached, by the way that Flower's own calls take.

Flower's SuperNode calls the server through httpx, which obeys the proxy variables of the
environment. A probe over plain TCP would go around the proxy, and could succeed while every call
fails. Runs in `deploy node` and in `deploy server`.
"""

from __future__ import annotations

import os
import ssl
from pathlib import Path
from urllib.request import proxy_bypass

import httpx

from fedprompt.deploy.addresses import split_address

FLEET = "/v1/fleet/"
VARIABLES = ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
"""The variables that may name a proxy for a server with TLS; the first one that is set counts."""
UNAVAILABLE = 503
"""The fleet proxy's status when the SuperLink does not answer."""
TIMEOUT_S = 5.0


def call(server: str, authority: Path) -> int | None:
    """Make a call of the Fleet API that no node would make.

    Args:
        server: the server's address, `host:port`.
        authority: the certificate that the server's certificate must be issued by.

    Returns:
        The status of the answer; None if there was none.
    """
    try:
        context = ssl.create_default_context(cafile=str(authority))
        with httpx.Client(verify=context, timeout=TIMEOUT_S) as client:
            return client.post(f"https://{server}{FLEET}ping").status_code
    except (httpx.HTTPError, OSError) as error:
        # A server with a wrong certificate has answered; Flower gives the reason when it exits.
        return 0 if "CERTIFICATE_VERIFY_FAILED" in str(error) else None


def proxy_variable(server: str) -> str:
    """The environment variable whose proxy calls to the server go through; empty for none.

    Args:
        server: the server's address, `host:port`.
    """
    host = split_address(server)[0].strip("[]")
    if proxy_bypass(host):
        return ""
    return next((name for name in VARIABLES if os.environ.get(name)), "")
