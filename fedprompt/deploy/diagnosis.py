"""Why a node and the server do not trust each other, although they reach each other.

Runs in `deploy node`. Flower ends the SuperNode without a reason when the clocks of the two
machines differ, and retries for ever when the server's certificate has expired. One call of the
server's port tells: its TLS handshake checks the certificate, and its answer has the server's time.
"""

from __future__ import annotations

import datetime
import ssl
import time
from base64 import b64encode
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx

from fedprompt.deploy.addresses import split_address
from fedprompt.deploy.callers import PUBLIC_KEY, SHUT_OUT
from fedprompt.deploy.credentials import key_to_pem, read_public_key

TIMEOUT_S = 5.0
AHEAD_S, BEHIND_S = 5.0, 300.0
"""How far a node's clock may be ahead of the server's and behind it, in seconds; Flower signs each
call with a timestamp."""
SLACK_S = 2.0
"""How exactly clocks can be compared: the server's time has whole seconds, and travels."""
EXPIRED, NOT_YET_VALID, OTHER_HOST = 10, 9, 62
"""OpenSSL's numbers of reasons for which it rejects a certificate."""


def find_fault(server: str, authority: Path, key: Path | None = None) -> str | None:
    """Call the server's port once, and find out why it and this node would refuse each other.

    Args:
        server: the server's address, `host:port`.
        authority: the certificate of this federation's authority, `ca.crt`.
        key: this node's public key, `node.pub`; without it, the server is not asked whether the
            node has been shut out.

    Returns:
        One line, or None if there is no fault or the server cannot be reached.
    """
    try:
        context = ssl.create_default_context(cafile=str(authority))
    except (OSError, ValueError) as error:
        return f"{authority} cannot be read: {getattr(error, 'strerror', None) or error}"
    headers = {}
    if key is not None and key.is_file():
        headers = {PUBLIC_KEY: b64encode(key_to_pem(read_public_key(key)))}
    try:
        # With httpx, as Flower calls it: a proxy that the environment names is used here as well.
        with httpx.Client(verify=context, timeout=TIMEOUT_S) as client:
            answer = client.get(f"https://{server}/", headers=headers)
    except httpx.HTTPError as error:
        rejected = _certificate_error(error)
        host = split_address(server)[0]
        return None if rejected is None else _rejected(server, host, rejected.verify_code)
    if answer.status_code == SHUT_OUT:
        return (
            f"the server {server} has shut this node out: its approval was revoked or has expired; "
            "ask the server's administrator"
        )
    try:
        theirs = parsedate_to_datetime(answer.headers.get("date", "")).timestamp()
    except (ValueError, TypeError):
        return None
    return _clock_fault(time.time() - theirs, server)


def _certificate_error(error: BaseException | None) -> ssl.SSLCertVerificationError | None:
    """The rejected certificate behind an error of httpx, if that is the reason."""
    while error is not None and not isinstance(error, ssl.SSLCertVerificationError):
        error = error.__cause__ or error.__context__
    return error


def _rejected(server: str, host: str, code: int) -> str:
    now = f"this machine's clock says {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"
    if code == EXPIRED:
        return (
            f"the certificate of {server} or of its authority (ca.crt) has expired; {now}. If that "
            "is right, renew it with 'fedprompt deploy renew' on the machine with the authority"
        )
    if code == NOT_YET_VALID:
        return f"the certificate of {server} is not valid yet; {now}: set the clock"
    if code == OTHER_HOST:
        return f"the certificate of {server} was not issued for {host}; use a host of 'deploy init'"
    return f"the certificate of {server} was not issued by this federation's authority (ca.crt)"


def _clock_fault(ahead_s: float, server: str) -> str | None:
    """One line if the clocks differ by so much that Flower refuses this node's calls."""
    if -BEHIND_S - SLACK_S < ahead_s < AHEAD_S + SLACK_S:
        return None
    direction = "ahead of" if ahead_s > 0 else "behind"
    return (
        f"the clock of this machine is {abs(ahead_s):.0f} s {direction} that of {server}, which "
        "therefore refuses its calls; synchronise both clocks (NTP)"
    )
