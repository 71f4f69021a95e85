"""`fedprompt deploy request`, `approve`, `join`, `revoke` and `withdraw`: who belongs to it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

NodeFolderPath = Annotated[Path, typer.Argument(help="The node's folder.", metavar="NODE")]
ServerFolderPath = Annotated[Path, typer.Argument(help="The server's folder.", metavar="SERVER")]


def request(
    folder: NodeFolderPath,
    name: Annotated[str, typer.Option("--name", help="The institution's name.")],
) -> None:
    """On a node: make its key, and the request to send to the server's administrator."""
    from fedprompt.deploy.joining.node_side import make_request

    path = make_request(folder, name)
    print(f"wrote {path}; send it to the server's administrator. It holds no secret.")
    print(f"The private key stays in {folder} and must not leave this machine.")


def approve(
    server: ServerFolderPath,
    request: Annotated[Path, typer.Argument(help="The node's request file.", metavar="REQUEST")],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The package to write (default: package-K.json)."),
    ] = None,
    client: Annotated[
        int | None,
        typer.Option("--client", min=0, help="Its client number (default: the first free one)."),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option("--host", help="Name under which it reaches the server (default: of init)."),
    ] = None,
    days: Annotated[int, typer.Option("--days", help="How long the approval holds.")] = 365,
) -> None:
    """On the server: let a node in, and write the package to return to it."""
    from fedprompt.deploy.folders import read_server_folder
    from fedprompt.deploy.joining.server_side import approve

    settings = read_server_folder(server)
    member, package, code = approve(settings, request, out, days=days, client=client, host=host)
    print(f"{member.name} is client {member.client}, until {member.expires:%Y-%m-%d}")
    print(f"wrote {package}; send it to the node's administrator. It holds no secret.")
    print(f"Code, to compare by telephone with that of 'deploy join': {code}")
    _register(settings)


def join(
    folder: NodeFolderPath,
    package: Annotated[Path, typer.Argument(help="What the server returned.", metavar="PACKAGE")],
) -> None:
    """On a node: unpack what the server's administrator has returned."""
    from fedprompt.deploy.joining.node_side import join

    code = join(folder, package)
    print(f"Code, to compare by telephone with that of 'deploy approve': {code}")
    print(f"Only if the two are equal, start the node: fedprompt deploy node {folder} --data ...")


def revoke(
    server: ServerFolderPath,
    node: Annotated[
        str, typer.Argument(help="The node's client number or its name.", metavar="CLIENT")
    ],
) -> None:
    """On the server: shut a node out at once; its key is never accepted again."""
    from fedprompt.deploy.folders import read_server_folder
    from fedprompt.deploy.joining.server_side import revoke

    settings = read_server_folder(server)
    member = revoke(settings, node)
    print(f"client {member.client} ({member.name or 'no name'}) is shut out")
    _register(settings)


def withdraw(
    server: ServerFolderPath,
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.", metavar="RUN")],
    client: Annotated[
        int, typer.Option("--client", min=0, help="The client whose contribution is removed.")
    ],
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the result.")] = False,
) -> None:
    """On the server: repeat a run without a site that has been shut out, and compare the two."""
    from fedprompt.deploy.folders import read_server_folder
    from fedprompt.deploy.withdraw import FILE, withdraw
    from fedprompt.experiment.display import make_display

    display = make_display(quiet)
    try:
        found = withdraw(read_server_folder(server), run, client, display)
    finally:
        display.close()
    for part in ("global", "personal"):
        before, after = (
            "-" if value is None else f"{100 * value:.1f} %" for value in found[f"{part}_accuracy"]
        )
        print(f"{part} accuracy: {before} with client {client}, {after} without")
    print(f"distance of the shared prompts: {found['distance_of_shared_prompts']:.4g}")
    print(f"wrote {Path(found['repeated']) / FILE}")


def _register(server: object) -> None:
    """Tell a running SuperLink about keys that have come or gone."""
    from fedprompt.deploy.folders import ServerFolder
    from fedprompt.deploy.key_registration import register_keys
    from fedprompt.deploy.processes import listens

    assert isinstance(server, ServerFolder)
    if listens(server.superlink_port):
        server.prepare()
        register_keys(server, server.environment)
        print("the running server knows about it")
    else:
        print("the server is not running; it will know about it when it starts")
