"""`fedprompt deploy`: a federation of real machines."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from fedprompt.cli.completion import complete_experiment
from fedprompt.cli.data import Overrides
from fedprompt.errors import UserError

deploy_app = typer.Typer(
    help="One server and N nodes over TLS, every node with its own images. See docs/deployment.md.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the result.")]
Experiment = Annotated[
    str | None,
    typer.Argument(help="A shipped experiment or a YAML file.", autocompletion=complete_experiment),
]
Resume = Annotated[
    Path | None, typer.Option("--resume", help="Go on with an interrupted run folder.")
]
ServerDir = Annotated[Path, typer.Argument(help="The server's folder.", metavar="SERVER")]


@deploy_app.command()
def local(
    experiment: Experiment = None,
    overrides: Overrides = None,
    resume: Resume = None,
    folder: Annotated[
        Path | None,
        typer.Option("--folder", help="Keys, logs and the nodes' folders [<run folder>-nodes]."),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Run an experiment on a server and nodes that are real processes of this machine."""
    from fedprompt.deploy.local import resume_local, run_local
    from fedprompt.experiment.compose import compose
    from fedprompt.experiment.display import make_display

    if (experiment is None) == (resume is None):
        raise UserError(
            "give an experiment, e.g. 'fedprompt deploy local quickstart', or --resume."
        )
    display = make_display(quiet)
    try:
        if resume is not None:
            resume_local(resume, display, folder)
        else:
            assert experiment is not None
            run_local(compose(experiment, overrides or []), display, folder)
    finally:
        display.close()


@deploy_app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="A new folder for keys and settings.")],
    host: Annotated[
        list[str],
        typer.Option("--host", help="Name or address by which nodes reach the server; repeatable."),
    ],
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="Number of nodes.")],
    port: Annotated[int, typer.Option("--port", help="The server's port for the nodes.")] = 9092,
    days: Annotated[
        int, typer.Option("--days", min=1, help="Certificates are valid so long.")
    ] = 365,
) -> None:
    """Make certificates and keys for one server and N nodes, and print what to do with them."""
    from fedprompt.deploy.folders import init as make
    from fedprompt.deploy.folders import readme

    make(folder, host, nodes, port, days)
    print(readme(host[0], port, nodes))
    print(f"written: {folder} (this text is {folder / 'README.md'})")


@deploy_app.command()
def server(
    folder: ServerDir,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on for nodes.")
    ] = "0.0.0.0",
    port: Annotated[int | None, typer.Option("--port", help="Port for nodes.")] = None,
) -> None:
    """Run the server's side until it is stopped; what ends is started again."""
    from fedprompt.deploy.folders import read_server
    from fedprompt.deploy.supervise import serve

    site = read_server(folder)
    serve(replace(site, port=port or site.port), host)


@deploy_app.command()
def node(
    folder: Annotated[Path, typer.Argument(help="The node's folder.", metavar="NODE")],
    data: Annotated[
        Path | None, typer.Option("--data", help="This node's images, folder/class/*.jpg.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[
        int | None, typer.Option("--threads", help="CPU threads; else as the experiment says.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", help="Local weights of the backbone.")
    ] = None,
    state: Annotated[
        Path | None, typer.Option("--state", help="Folder for private prompts [NODE/state].")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option("--cache", help="Folder for cached features [NODE/cache].")
    ] = None,
    superlink: Annotated[
        str | None, typer.Option("--server", help="Another address of the server, host:port.")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option("--port", help="For the node's own tasks, on loopback; any free one."),
    ] = None,
    require_secure_aggregation: Annotated[
        bool,
        typer.Option(
            "--require-secure-aggregation", help="Answer no experiment whose server sees updates."
        ),
    ] = False,
    require_noise: Annotated[
        float,
        typer.Option("--require-noise", min=0, help="Least privacy.noise that is answered."),
    ] = 0.0,
) -> None:
    """Run one node until it is stopped; what ends is started again."""
    from fedprompt.deploy.folders import read_node_site
    from fedprompt.deploy.node_config import read_node
    from fedprompt.deploy.supervise import run_node

    site = read_node_site(folder)
    if data is not None and not data.is_dir():
        raise UserError(f"--data: there is no folder {data}.")
    if checkpoint is not None and not checkpoint.is_file():
        raise UserError(f"--checkpoint: there is no file {checkpoint}.")
    if superlink is not None and not re.fullmatch(r".+:\d{1,5}", superlink):
        raise UserError(f"--server is {superlink!r}; it must be host:port.")
    paths = {"data": data, "checkpoint": checkpoint, "state-dir": state, "cache-dir": cache}
    settings = {k: str(p.expanduser().resolve()) for k, p in paths.items() if p is not None}
    given = {
        **settings, "device": device, "threads": threads,
        "require-secure-aggregation": require_secure_aggregation, "require-noise": require_noise,
    }  # fmt: skip
    read_node({"partition-id": site.client, **{k: v for k, v in given.items() if v is not None}})
    run_node(replace(site, server=superlink or site.server), given, port)


@deploy_app.command()
def run(
    folder: ServerDir,
    experiment: Experiment = None,
    overrides: Overrides = None,
    resume: Resume = None,
    quiet: Quiet = False,
) -> None:
    """Run an experiment on the nodes of the server that runs on this machine."""
    from fedprompt.deploy.folders import read_server
    from fedprompt.deploy.supervise import resume_here, run_here
    from fedprompt.experiment.compose import compose
    from fedprompt.experiment.display import make_display

    if (experiment is None) == (resume is None):
        raise UserError("give an experiment or --resume RUN.")
    site, display = read_server(folder), make_display(quiet)
    try:
        if resume is not None:
            resume_here(site, resume, display)
        else:
            assert experiment is not None
            run_here(site, compose(experiment, overrides or []), display)
    finally:
        display.close()


@deploy_app.command()
def gate(
    folder: ServerDir,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option("--port", help="Port to listen on.")] = None,
    superlink_port: Annotated[
        int | None, typer.Option("--superlink-port", help="The SuperLink's, on loopback.")
    ] = None,
) -> None:
    """Pass on what nodes may ask of the SuperLink, and nothing else (part of 'deploy server')."""
    from fedprompt.deploy.fleet_proxy import serve
    from fedprompt.deploy.folders import read_server

    site = read_server(folder)
    serve(site.folder, host, port or site.port, superlink_port or site.superlink_port)


@deploy_app.command()
def worker(
    socket: Annotated[Path, typer.Argument(help="Unix socket to listen on.", metavar="SOCKET")],
) -> None:
    """Answer a node's messages in one warm process (part of 'deploy node')."""
    from fedprompt.deploy.worker import serve

    serve(socket)


@deploy_app.command()
def example(
    folder: Annotated[Path, typer.Argument(help="A new folder.")],
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="Number of client folders.")] = 3,
    images: Annotated[
        int, typer.Option("--images", min=2, help="Images per class and domain.")
    ] = 12,
) -> None:
    """Write image folders of the embedded drawings, one per client, and an experiment on them."""
    from fedprompt.deploy.example import write_example

    path = write_example(folder, nodes, images)
    print(f"wrote {path}; try 'fedprompt deploy local {path}'")
