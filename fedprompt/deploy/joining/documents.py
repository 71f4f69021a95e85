"""Signed files that two administrators send each other: a request and a package.

A document is JSON with a `kind` and a `signature` (ECDSA with SHA-256, in hexadecimal) of all other
keys. The signature shows that nothing has been changed since the owner of the key signed it. Whose
key it is, the administrators find out by comparing codes.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from fedprompt.deploy.credentials import has_signed
from fedprompt.errors import UserError
from fedprompt.files import read_regular, write_bytes

MAX_BYTES = 100_000
"""Largest document that is read; ours have some thousand bytes."""


def write_document(
    path: Path, kind: str, content: Mapping[str, Any], key: ec.EllipticCurvePrivateKey
) -> None:
    """Sign and write a document.

    Args:
        path: the file to create or replace.
        kind: what it is, e.g. `fedprompt request`.
        content: plain JSON.
        key: the signer's private key.

    Raises:
        UserError: the file cannot be written.
    """
    signed = {**content, "kind": kind}
    signature = key.sign(_canonical(signed), ec.ECDSA(hashes.SHA256())).hex()
    text = json.dumps(signed | {"signature": signature}, indent=2, ensure_ascii=False) + "\n"
    try:
        write_bytes(path, text.encode())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}.") from None


def read_document(path: Path, kind: str, types: Mapping[str, type]) -> dict[str, Any]:
    """Read a document; its signature has to be checked with `check_signature`.

    Args:
        path: the file; every byte of it is untrusted.
        kind: what it must be.
        types: the keys that it must have, and the types of their values.

    Returns:
        The content, with `kind` and `signature`.

    Raises:
        UserError: the file cannot be read, or is no such document.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError("too long")
        content = json.loads(read_regular(path))
        # Half of a surrogate pair is no character, and could not be written to any file.
        json.dumps(content, ensure_ascii=False).encode()
        complete = isinstance(content, dict) and content.get("kind") == kind
        if complete and all(
            type(content.get(k)) is t for k, t in {**types, "signature": str}.items()
        ):
            return dict(content)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from None
    except (ValueError, RecursionError):
        pass
    raise UserError(f"{path} is no {kind}, or it is damaged; ask for the file again.")


def check_signature(path: Path, content: Mapping[str, Any], key: ec.EllipticCurvePublicKey) -> None:
    """Check that the owner of a key has signed a document as it is.

    Raises:
        UserError: it has been changed, or somebody else has signed it.
    """
    signed = {k: v for k, v in content.items() if k != "signature"}
    try:
        signature = bytes.fromhex(content["signature"])
    except ValueError:
        signature = b""
    if not has_signed(key, _canonical(signed), signature):
        raise UserError(f"{path} has been changed since it was signed; ask for the file again.")


def parse_date(text: str) -> datetime.datetime:
    """A date with its time zone, as we write it.

    Raises:
        ValueError: it is none.
    """
    date = datetime.datetime.fromisoformat(text)
    if date.tzinfo is None:
        raise ValueError("no time zone")
    return date


def code_of(content: Mapping[str, Any]) -> str:
    """Twenty digits of a hash of a document's content, in groups to read aloud.

    Eighty bits: too many to find another document with the same code.
    """
    signed = {k: v for k, v in content.items() if k not in ("signature", "kind")}
    digits = hashlib.sha256(_canonical(signed)).hexdigest()[:20]
    return " ".join(digits[i : i + 4] for i in range(0, len(digits), 4))


def _canonical(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
