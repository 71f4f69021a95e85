"""`fedprompt deploy`: commands for a federation of real machines (see docs/deployment.md)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from fedprompt.cli.completion import complete_experiment
from fedprompt.cli.data import Overrides
from fedprompt.cli.deploy_join import approve, join, request, revoke, withdraw
from fedprompt.cli.deploy_site import audit_app, check, ledger
from fedprompt.cli.deploy_use import export, predict
from fedprompt.errors import UserError

deploy_app = typer.Typer(
    help="One server and N nodes over TLS, every node with its own images. See docs/deployment.md.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

deploy_app.command()(predict)
deploy_app.command()(export)
for command in (request, approve, join, revoke, withdraw):
    deploy_app.command()(command)
deploy_app.command()(check)
deploy_app.command()(ledger)
deploy_app.add_typer(audit_app, name="audit")

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the result.")]
Experiment = Annotated[
    str | None,
    typer.Argument(help="A shipped experiment or a YAML file.", autocompletion=complete_experiment),
]
Resume = Annotated[
    Path | None, typer.Option("--resume", help="Resume the interrupted run in this folder.")
]
ServerPath = Annotated[Path, typer.Argument(help="The server's folder.", metavar="SERVER")]


@deploy_app.command()
def local(
    experiment: Experiment = None,
    overrides: Overrides = None,
    resume: Resume = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--folder", help="For keys, logs and the nodes' files (default: <run folder>-nodes)."
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Run an experiment on a server and nodes that are all processes on this machine."""
    from fedprompt.deploy.local import resume_local, run_local
    from fedprompt.experiment.compose import compose
    from fedprompt.experiment.display import make_display

    if (experiment is None) == (resume is None):
        raise UserError(
            "give either an experiment, for example 'fedprompt deploy local quickstart', or "
            "--resume RUN."
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
    nodes: Annotated[
        int,
        typer.Option(
            "--nodes",
            min=0,
            help="Nodes whose keys are all made here, for trials (default: none; see 'request').",
        ),
    ] = 0,
    port: Annotated[int, typer.Option("--port", help="The server's port for the nodes.")] = 9092,
    days: Annotated[
        int, typer.Option("--days", help="How long the server's certificate is valid.")
    ] = 365,
) -> None:
    """Create the certificates of a server, and for trials the keys of N nodes; print next steps."""
    from fedprompt.deploy.new_federation import create_federation, instructions

    create_federation(folder, host, nodes, port, days)
    print(instructions(host[0], port, nodes))
    print(f"These files are in {folder}, and this text is in {folder / 'README.md'}.")


@deploy_app.command()
def renew(
    folder: Annotated[
        Path, typer.Argument(help="The folder that 'deploy init' wrote.", metavar="FEDERATION")
    ],
    days: Annotated[
        int, typer.Option("--days", help="How long the server's new certificate is valid.")
    ] = 365,
) -> None:
    """Issue the server's certificate again before it expires, and print the next steps."""
    from fedprompt.deploy.new_federation import renew_federation

    for step in renew_federation(folder, days):
        print(step)


@deploy_app.command()
def server(
    folder: ServerPath,
    host: Annotated[
        str, typer.Option("--host", help="Address on which to listen for nodes.")
    ] = "0.0.0.0",
    port: Annotated[
        int | None, typer.Option("--port", help="Port for the nodes (default: as set by init).")
    ] = None,
) -> None:
    """Run the server until it is stopped; processes that exit are restarted."""
    from fedprompt.deploy.addresses import check_port
    from fedprompt.deploy.folders import read_server_folder
    from fedprompt.deploy.supervise import serve

    settings = read_server_folder(folder)
    if port is not None:
        settings = replace(settings, port=check_port(port, "--port"))
    serve(settings, host)


@deploy_app.command()
def node(
    folder: Annotated[Path, typer.Argument(help="The node's folder.", metavar="NODE")],
    data: Annotated[
        Path | None, typer.Option("--data", help="This node's images, folder/class/*.jpg.")
    ] = None,
    root: Annotated[
        Path | None,
        typer.Option(
            "--root",
            help="This node's copy of the data set, where the experiment is not on --data folders.",
        ),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[
        int | None,
        typer.Option("--threads", help="CPU threads (default: as in the experiment)."),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", help="The backbone's weights, a local file or folder."),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            help="Format in which the backbone's weights are kept: float32, bf16, fp16, int8 or "
            "int4 (default: as in the experiment).",
        ),
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option("--state", help="Folder for private prompts (default: NODE/state)."),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option("--cache", help="Folder for cached features (default: NODE/cache)."),
    ] = None,
    policy: Annotated[
        Path | None,
        typer.Option("--policy", help="YAML file with what this node answers and reveals."),
    ] = None,
    records: Annotated[
        Path | None,
        typer.Option(
            "--records", help="Folder for audit log and privacy ledger (default: NODE/records)."
        ),
    ] = None,
    superlink: Annotated[
        str | None,
        typer.Option("--server", help="The server's address, host:port (default: as set by init)."),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            "--port", help="Loopback port for the node's own processes (default: any free one)."
        ),
    ] = None,
    require_secure_aggregation: Annotated[
        bool,
        typer.Option(
            "--require-secure-aggregation",
            help="Refuse experiments in which the server sees this node's updates.",
        ),
    ] = False,
    require_noise: Annotated[
        float,
        typer.Option(
            "--require-noise", min=0, help="Refuse experiments with a lower privacy.noise."
        ),
    ] = 0.0,
) -> None:
    """Run one node until it is stopped; processes that exit are restarted."""
    from fedprompt.deploy.addresses import check_port, check_server
    from fedprompt.deploy.folders import read_node_folder
    from fedprompt.deploy.governance.policy import read_policy
    from fedprompt.deploy.node_config import read_node_settings
    from fedprompt.deploy.supervise import run_node

    node_folder = read_node_folder(folder)
    for option, path in (("--data", data), ("--root", root)):
        if path is not None and not path.is_dir():
            raise UserError(f"{option}: there is no folder {path}.")
    if checkpoint is not None and not checkpoint.exists():
        raise UserError(f"--checkpoint: there is no file or folder {checkpoint}.")
    if superlink is not None:
        superlink = check_server(superlink, "--server")
    if port is not None:
        check_port(port, "--port")
    if policy is not None:
        read_policy(policy)  # a mistake in it is reported at the start
    paths = {"data": data, "root": root, "checkpoint": checkpoint, "policy": policy}
    paths |= {"state-dir": state, "cache-dir": cache, "records": records}
    settings = {
        **{k: str(p.expanduser().resolve()) for k, p in paths.items() if p is not None},
        "device": device, "threads": threads, "weights": weights,
        "require-secure-aggregation": require_secure_aggregation, "require-noise": require_noise,
    }  # fmt: skip
    # Also checked on the node's first message; checking here reports a mistake at the start.
    given = {k: v for k, v in settings.items() if v is not None}
    read_node_settings({"partition-id": node_folder.client, **given})
    run_node(replace(node_folder, server=superlink or node_folder.server), settings, port)


@deploy_app.command()
def run(
    folder: ServerPath,
    experiment: Experiment = None,
    overrides: Overrides = None,
    resume: Resume = None,
    quiet: Quiet = False,
) -> None:
    """Run an experiment on the nodes of the server that runs on this machine."""
    from fedprompt.deploy.folders import read_server_folder
    from fedprompt.deploy.submit import resume_on_server, run_on_server
    from fedprompt.experiment.compose import compose
    from fedprompt.experiment.display import make_display

    if (experiment is None) == (resume is None):
        raise UserError("give either an experiment or --resume RUN.")
    settings, display = read_server_folder(folder), make_display(quiet)
    try:
        if resume is not None:
            resume_on_server(settings, resume, display)
        else:
            assert experiment is not None
            run_on_server(settings, compose(experiment, overrides or []), display)
    finally:
        display.close()


@deploy_app.command()
def status(
    folder: ServerPath,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    port: Annotated[
        int | None,
        typer.Option(
            "--serve",
            help="Show a page, status.json and Prometheus' metrics on this port of 127.0.0.1.",
        ),
    ] = None,
) -> None:
    """Show nodes, newest run, disk and GPUs of the server that runs on this machine."""
    import json

    from fedprompt.deploy.addresses import check_port
    from fedprompt.deploy.folders import read_server_folder
    from fedprompt.deploy.monitoring.collect import collect
    from fedprompt.deploy.monitoring.serve import serve
    from fedprompt.deploy.monitoring.views import as_text
    from fedprompt.deploy.processes import listens

    settings = read_server_folder(folder)
    if port is not None:
        if listens(check_port(port, "--serve")):
            raise UserError(f"--serve: port {port} is in use; choose another.")
        print(f"the state is shown at http://127.0.0.1:{port}/ until Ctrl-C", flush=True)
        serve(settings, port)
        return
    state = collect(settings)
    print(json.dumps(state.as_json(), indent=2) if as_json else as_text(state))


@deploy_app.command()
def fleet_proxy(
    folder: ServerPath,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option("--port", help="Port to listen on.")] = None,
    superlink_port: Annotated[
        int | None, typer.Option("--superlink-port", help="The SuperLink's loopback port.")
    ] = None,
) -> None:
    """Forward what nodes may ask of the SuperLink, and nothing else (part of 'deploy server')."""
    from fedprompt.deploy.fleet_proxy import serve
    from fedprompt.deploy.folders import read_server_folder

    settings = read_server_folder(folder)
    serve(settings.path, host, port or settings.port, superlink_port or settings.superlink_port)


@deploy_app.command()
def worker(
    socket: Annotated[Path, typer.Argument(help="Unix socket to listen on.", metavar="SOCKET")],
) -> None:
    """Answer a node's messages in one process that keeps CLIP loaded (part of 'deploy node')."""
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
    """Write image folders of drawn scenes, one per client, and an experiment that uses them."""
    from fedprompt.deploy.example import write_example

    path = write_example(folder, nodes, images)
    print(f"wrote {path}; try 'fedprompt deploy local {path}'")
    print(f"on nodes of their own: 'fedprompt deploy node NODE --data {folder}/client-K' on each,")
    print(f"then 'fedprompt deploy run SERVER {path}'")
