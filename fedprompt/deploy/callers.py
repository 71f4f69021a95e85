"""Tells the federation's nodes from all other callers, before the body of a request is read.

Runs in the fleet proxy. Flower's SuperNode sends three headers with every call: its public key, a
timestamp, and its signature of the timestamp. The SuperLink checks them too, but only after it has
read the whole request, whoever sent it.
"""

from __future__ import annotations

import binascii
import datetime
from base64 import b64decode
from collections.abc import Iterable
from pathlib import Path

from fedprompt.deploy.credentials import has_signed, key_to_pem, read_public_key

PUBLIC_KEY, TIMESTAMP, SIGNATURE = b"flwr-public-key", b"flwr-timestamp", b"flwr-signature"
TOLERANCE_S = 305.0
"""How old Flower lets a timestamp be, in seconds."""


class Callers:
    """The callers whose signature is known.

    Args:
        keys: the files with the nodes' public keys.

    Raises:
        UserError: a file is damaged.
    """

    def __init__(self, keys: Iterable[Path]) -> None:
        self._keys = {key_to_pem(key): key for key in map(read_public_key, keys)}

    def knows(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        """Whether a node of the federation has signed these headers within the last minutes.

        Args:
            headers: names in lower case, and values; they are untrusted.
        """
        values = dict(headers)
        try:
            key = self._keys[b64decode(values[PUBLIC_KEY], validate=True)]
            signature = b64decode(values[SIGNATURE], validate=True)
            timestamp = values[TIMESTAMP]
            signed = datetime.datetime.fromisoformat(timestamp.decode("ascii"))
            age_s = (datetime.datetime.now(datetime.UTC) - signed).total_seconds()
        # Headers that are missing, malformed or without a time zone.
        except (KeyError, ValueError, TypeError, binascii.Error):
            return False
        return abs(age_s) < TOLERANCE_S and has_signed(key, timestamp, signature)
