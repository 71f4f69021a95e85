"""Reads a client's reply to one stage, on the server.

Every byte of a reply comes from a client, so types and sizes are checked before use.
"""

from __future__ import annotations

from typing import Any

from flwr.app import ConfigRecord, RecordDict

from fedprompt.messages import Refused
from fedprompt.privacy.secure_aggregation import RECORD


def record_of(content: RecordDict) -> ConfigRecord:
    """The one record of a reply.

    Raises:
        Refused: the reply has other records.
    """
    record = content.get(RECORD)
    if set(content) != {RECORD} or not isinstance(record, ConfigRecord):
        raise Refused(f"records {sorted(content)} instead of ['{RECORD}']")
    return record


def bytes_of(value: Any, longest: int) -> bytes:
    """A value that must be at most `longest` bytes.

    Raises:
        Refused: it is longer or something else.
    """
    if not isinstance(value, bytes) or len(value) > longest:
        raise Refused(f"no bytes, or more than {longest}")
    return value


def list_of(record: ConfigRecord, name: str) -> list[Any]:
    """A value that must be a list.

    Raises:
        Refused: it is missing or something else.
    """
    value = record.get(name)
    if not isinstance(value, list):
        raise Refused(f"no list '{name}'")
    return value
