"""Says when certificates expire: at the start of `deploy server` and `deploy node`, and daily.

An expired certificate cuts every node off at once, so it is said weeks before.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fedprompt.deploy.credentials import validity
from fedprompt.errors import UserError

WARN = datetime.timedelta(days=30)
"""How long before its end a certificate is mentioned."""
AGAIN = datetime.timedelta(days=1)
"""Time between two mentions."""
APPROVE = (
    "renew it with 'fedprompt deploy approve' of the same request on the server, and 'fedprompt "
    "deploy join' on the node"
)
RENEW = "renew it with 'fedprompt deploy renew' on the machine with the authority"


def expires_soon(path: Path, days: int = 7) -> bool:
    """Whether a certificate has expired or will within some days.

    Raises:
        UserError: the file cannot be read, or holds no certificate.
    """
    limit = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
    return validity(path)[1] < limit


class Expiry:
    """Watches over the dates of some certificates.

    Args:
        certificates: their files.
        report: is called with each line for the administrator.
        now: returns the present time.
        approvals: returns what else expires, such as "the approval of client 3", and when.
    """

    def __init__(
        self,
        certificates: Sequence[Path],
        report: Callable[[str], None],
        now: Callable[[], datetime.datetime] = lambda: datetime.datetime.now(datetime.UTC),
        *,
        approvals: Callable[[], Mapping[str, datetime.datetime]] = dict,
    ) -> None:
        self._certificates, self._report, self._now = certificates, report, now
        self._approvals = approvals
        self._last: datetime.datetime | None = None

    def check(self) -> None:
        """Refuse certificates that are not valid now, and mention those that expire soon.

        Raises:
            UserError: a certificate is missing, damaged, expired or not valid yet.
        """
        now = self._now()
        for path in self._certificates:
            start, end = validity(path)
            clock = f"this machine's clock says {now:%Y-%m-%d %H:%M} UTC"
            if now < start:
                raise UserError(f"{path} is valid from {start:%Y-%m-%d %H:%M} UTC on; {clock}.")
            if now > end:
                raise UserError(f"{path} has expired on {end:%Y-%m-%d}; {clock}; {RENEW}.")
        self.mention()

    def mention(self) -> None:
        """Mention certificates that expire soon, once a day; to be called in a loop."""
        now = self._now()
        if self._last is not None and now - self._last < AGAIN:
            return
        self._last = now
        for path in self._certificates:
            _, end = validity(path)
            if end - now < WARN:
                days = max(0, (end - now).days)
                self._report(f"{path} expires on {end:%Y-%m-%d}, in {days} days; {RENEW}")
        for what, end in self._approvals().items():
            if now > end:
                self._report(f"{what} has expired on {end:%Y-%m-%d}; {APPROVE}")
            elif end - now < WARN:
                days = (end - now).days
                self._report(f"{what} expires on {end:%Y-%m-%d}, in {days} days; {APPROVE}")
