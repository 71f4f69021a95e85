"""Reads a client's reply to one stage, on the server.

Every byte of a reply comes from a client, so types and sizes are checked before use.
"""

from __future__ import annotations

from typing import Any

from flwr.app import ConfigRecord, Message

from fedprompt.messages import error_reason
from fedprompt.privacy.secure_aggregation import RECORD


class Malformed(Exception):
    """A reply that is not what its stage asks for; the message gives the reason."""


def record_of(reply: Message) -> ConfigRecord:
    """The one record of a reply.

    Raises:
        Malformed: it is an error, or has other records.
    """
    if reply.has_error():
        raise Malformed(error_reason(reply))
    record = reply.content.get(RECORD)
    if set(reply.content) != {RECORD} or not isinstance(record, ConfigRecord):
        raise Malformed(f"records {sorted(reply.content)} instead of ['{RECORD}']")
    return record


def bytes_of(value: Any, longest: int) -> bytes:
    """A value that must be at most `longest` bytes.

    Raises:
        Malformed: it is longer or something else.
    """
    if not isinstance(value, bytes) or len(value) > longest:
        raise Malformed(f"no bytes, or more than {longest}")
    return value


def list_of(record: ConfigRecord, name: str) -> list[Any]:
    """A value that must be a list.

    Raises:
        Malformed: it is missing or something else.
    """
    value = record.get(name)
    if not isinstance(value, list):
        raise Malformed(f"no list '{name}'")
    return value
