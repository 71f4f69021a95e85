"""Host names, IP addresses and ports, as administrators write them and as messages name them."""

from __future__ import annotations

import ipaddress
import re

from fedprompt.errors import UserError

LABEL = r"[A-Za-z0-9]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?"
"""One part of a host name."""


def check_host(text: str, option: str, *, listens: bool = False) -> str:
    """Check a host name or an IP address without a port.

    Args:
        text: what the administrator has written; an IPv6 address may be in brackets.
        option: where it was written, for the message.
        listens: whether it is an address to listen on, which may stand for all addresses.

    Returns:
        The name or address, without brackets.

    Raises:
        UserError: it is neither a name nor an address, or no other machine can connect to it.
    """
    host = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        address = None
    if address is not None and "%" not in host:
        if address.is_unspecified and not listens:
            raise UserError(
                f"{option} is {text!r}, which stands for all addresses of a machine; give the name "
                "or address by which nodes reach the server."
            )
        return host
    name, colon, port = host.partition(":")
    if colon and port.isdigit():
        raise UserError(
            f"{option} is {text!r}, a host with a port; give the host alone, {name}, and the port "
            f"with --port {port}."
        )
    # A last part of digits would make it an IPv4 address, and it is none.
    whole = rf"({LABEL}\.)*(?![0-9]+$){LABEL}"
    if not re.fullmatch(whole, host) or len(host) > 253:
        raise UserError(f"{option} is {text!r}; it must be a host name or an IP address.")
    return host


def check_port(port: object, option: str) -> int:
    """Check a port's number.

    Raises:
        UserError: it is not a whole number from 1 to 65535.
    """
    # `True` is an `int` in Python.
    if isinstance(port, bool) or not isinstance(port, int) or not 1 <= port <= 65535:
        raise UserError(f"{option} is {port!r}; a port is a whole number from 1 to 65535.")
    return port


def check_server(text: str, option: str) -> str:
    """Check the address of a server, `host:port`, with an IPv6 address in brackets.

    Raises:
        UserError: it is not such an address.
    """
    host, port = split_address(text)
    bare = ":" in host and not host.startswith("[")
    if not host or not port.isascii() or not port.isdigit() or bare:
        raise UserError(f"{option} is {text!r}; it must be host:port, for example [::1]:9092.")
    return f"{in_url(check_host(host, option))}:{check_port(int(port), option)}"


def split_address(text: str) -> tuple[str, str]:
    """The host, in brackets if it was in brackets, and the port of `host:port`."""
    # An IPv6 address contains colons, so the last one precedes the port.
    host, _, port = text.rpartition(":")
    return host, port


def in_url(host: str) -> str:
    """A host as it is written before a port: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host
