"""`deploy request` and `deploy join`: the node's part of joining. Runs on the node.

The node's private key is made here and never leaves. A request holds the public key and a name. A
package holds what a node needs to know of the server, all of it public.
"""

from __future__ import annotations

import json
from pathlib import Path

from fedprompt.deploy.addresses import check_server
from fedprompt.deploy.credentials import (
    CA_CERTIFICATE,
    NODE_KEY,
    NODE_PUBLIC,
    certificate_key,
    parse_public_key,
    read_private_key,
    write_node_key,
)
from fedprompt.deploy.folders import SETTINGS
from fedprompt.deploy.joining.documents import (
    check_signature,
    code_of,
    parse_date,
    read_document,
    write_document,
)
from fedprompt.errors import UserError
from fedprompt.files import write_bytes
from fedprompt.runtime.peer_text import sanitised

REQUEST, PACKAGE = "fedprompt request", "fedprompt package"
REQUEST_FILE = "request.json"
REQUEST_KEYS = {"name": str, "public_key": str}
PACKAGE_KEYS = {
    "name": str,
    "public_key": str,
    "client": int,
    "server": str,
    "authority": str,
    "certificate": str,
    "expires": str,
}
MAX_NAME = 100


def make_request(folder: Path, name: str) -> Path:
    """Make a node's key, and the request that is sent to the server's administrator.

    A key that the folder already has is kept, so the command can be repeated.

    Args:
        folder: the node's folder, which is created if it does not exist.
        name: of the institution, for the server's administrator.

    Returns:
        The request file.

    Raises:
        UserError: the name is empty or too long, or the folder belongs to a node that has joined or
            cannot be written.
    """
    if not 0 < len(name) <= MAX_NAME or sanitised(name) != name or name.isdecimal():
        raise UserError(
            f"--name must have 1 to {MAX_NAME} printable characters, and not be a number."
        )
    if (folder / SETTINGS).exists():
        raise UserError(
            f"{folder} belongs to a node that has joined a federation; choose another folder."
        )
    # The public key is written last, so a folder without it has no key that anybody knows of.
    if not (folder / NODE_PUBLIC).is_file():
        write_node_key(folder)
    key = read_private_key(folder / NODE_KEY)
    public = (folder / NODE_PUBLIC).read_text().strip()
    path = folder / REQUEST_FILE
    write_document(path, REQUEST, {"name": name, "public_key": public}, key)
    return path


def join(folder: Path, package: Path) -> str:
    """Unpack what the server's administrator has returned.

    Args:
        folder: the node's folder, with its key.
        package: the package file; it is untrusted until the codes have been compared.

    Returns:
        The code that must be the one that the server has printed.

    Raises:
        UserError: the package is damaged, changed or for another node, or the folder has no key,
            belongs to another federation or cannot be written.
    """
    content = read_document(package, PACKAGE, PACKAGE_KEYS)
    try:
        parse_date(content["expires"])
    except ValueError:
        raise UserError(f"{package} is damaged: 'expires' is no date.") from None
    if content["client"] < 0:
        raise UserError(f"{package} is damaged: 'client' is {content['client']}.")
    authority = content["authority"].encode()
    check_signature(package, content, certificate_key(content["certificate"].encode(), authority))
    server = check_server(content["server"], f"{package}: server")
    own = read_private_key(folder / NODE_KEY).public_key()
    if parse_public_key(content["public_key"].encode(), package) != own:
        raise UserError(
            f"{package} is for another node: it names another key than {folder / NODE_PUBLIC}."
        )
    earlier = folder / CA_CERTIFICATE
    if earlier.is_file() and earlier.read_bytes() != authority and (folder / SETTINGS).exists():
        raise UserError(
            f"{folder} has joined another federation; use one folder for each, or remove {earlier} "
            "if the federation has been set up anew."
        )
    settings = {"server": server, "client": content["client"], "approved_until": content["expires"]}
    try:
        write_bytes(earlier, authority)
        # Last: `deploy node` accepts a folder only with its settings.
        write_bytes(folder / SETTINGS, (json.dumps(settings, indent=2) + "\n").encode())
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}.") from None
    return code_of(content)
