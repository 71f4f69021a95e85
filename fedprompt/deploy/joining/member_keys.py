"""The keys of the federation's nodes as they are at present, for the fleet proxy.

The proxy asks with every call, so the files are read again only when a folder has changed, or after
a while, because approvals expire.
"""

from __future__ import annotations

import datetime
import logging
import time
from pathlib import Path

from fedprompt.deploy.callers import Keys
from fedprompt.deploy.credentials import key_to_pem, parse_public_key
from fedprompt.deploy.joining.server_side import REVOKED, members, shut_out
from fedprompt.errors import UserError

log = logging.getLogger(__name__)

AGAIN_S = 60.0
"""Seconds after which the files are read again although the folders have not changed."""


class MemberKeys:
    """The keys in the server's folder.

    Args:
        server: the server's folder.
    """

    def __init__(self, server: Path) -> None:
        self._server = server
        self._keys: Keys | None = None
        self._seen: tuple[int, ...] = ()
        self._read_at = 0.0

    def read(self) -> Keys:
        """The keys at present.

        Raises:
            UserError: a file is damaged, and there are no earlier keys to go on with.
        """
        folders = (self._server / "nodes", self._server / "nodes" / REVOKED)
        seen = tuple(f.stat().st_mtime_ns if f.is_dir() else 0 for f in folders)
        now = time.monotonic()
        if self._keys is None or seen != self._seen or now - self._read_at > AGAIN_S:
            try:
                self._keys = _read(self._server)
            except UserError as error:
                # The proxy must not stop for all nodes because of one file.
                if self._keys is None:
                    raise
                log.warning("%s The keys stay as they were.", error)
            self._seen, self._read_at = seen, now
        return self._keys


def _read(server: Path) -> Keys:
    now = datetime.datetime.now(datetime.UTC)
    path = server / "nodes" / "node-{}.pub"
    approved, out = {}, set()
    for member in members(server):
        text = member.public_key.encode()
        key = parse_public_key(text, Path(str(path).format(member.client)))
        if member.expires is not None and member.expires < now:
            out.add(key_to_pem(key))
        else:
            approved[key_to_pem(key)] = key
    revoked = {key_to_pem(parse_public_key(t.encode(), server)) for t in shut_out(server)}
    # A revoked key is shut out, whatever else the folder says.
    return Keys({k: v for k, v in approved.items() if k not in revoked}, frozenset(out | revoked))
