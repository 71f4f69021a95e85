"""Tells the federation's nodes from all other callers, before the body of a request is read.

Runs in the fleet proxy. Flower's SuperNode sends three headers with every call: its public key, a
timestamp, and its signature of the timestamp. The SuperLink checks them too, but only after it has
read the whole request, whoever sent it.
"""

from __future__ import annotations

import binascii
import datetime
from base64 import b64decode
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric import ec

from fedprompt.deploy.credentials import has_signed

PUBLIC_KEY, TIMESTAMP, SIGNATURE = b"flwr-public-key", b"flwr-timestamp", b"flwr-signature"
SHUT_OUT = 403
"""The fleet proxy's status for a node that is shut out."""
TOLERANCE_S = 305.0
"""How old Flower lets a timestamp be, in seconds."""


@dataclass(frozen=True)
class Keys:
    """Public keys, in the form in which Flower's SuperNode sends them.

    Attributes:
        approved: the nodes' keys.
        shut_out: keys that are revoked, or whose approval has expired.
    """

    approved: Mapping[bytes, ec.EllipticCurvePublicKey]
    shut_out: frozenset[bytes] = frozenset()


class Callers:
    """The callers whose signature is known.

    Args:
        read: returns the keys as they are at present.

    Raises:
        UserError: a file with a key is damaged.
    """

    def __init__(self, read: Callable[[], Keys]) -> None:
        self._read = read
        read()  # a damaged file is reported at the start

    def refuses(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        """Whether these headers name a key that is shut out, or name anything twice.

        Args:
            headers: names in lower case, and values; they are untrusted. A caller that names a key
                of somebody else gains nothing. Of two values, this proxy and the SuperLink could
                each believe another one.
        """
        pairs = list(headers)
        names = [name for name, _ in pairs if name in (PUBLIC_KEY, TIMESTAMP, SIGNATURE)]
        if len(set(names)) < len(names):
            return True
        try:
            return b64decode(dict(pairs)[PUBLIC_KEY]) in self._read().shut_out
        except (KeyError, ValueError, binascii.Error):
            return False

    def knows(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        """Whether a node of the federation has signed these headers within the last minutes.

        Args:
            headers: names in lower case, and values; they are untrusted.
        """
        values = dict(headers)
        try:
            key = self._read().approved[b64decode(values[PUBLIC_KEY], validate=True)]
            signature = b64decode(values[SIGNATURE], validate=True)
            timestamp = values[TIMESTAMP]
            signed = datetime.datetime.fromisoformat(timestamp.decode("ascii"))
            age_s = (datetime.datetime.now(datetime.UTC) - signed).total_seconds()
        # Headers that are missing, malformed or without a time zone.
        except (KeyError, ValueError, TypeError, binascii.Error):
            return False
        return abs(age_s) < TOLERANCE_S and has_signed(key, timestamp, signature)
