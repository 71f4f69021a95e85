"""`fedprompt deploy check`, `ledger` and `audit`: a node's policy, and what it has recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedprompt.cli.completion import complete_experiment
from fedprompt.cli.data import Overrides
from fedprompt.errors import UserError

audit_app = typer.Typer(
    help="What a node was asked, and what has left it.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

NodePath = Annotated[
    Path, typer.Argument(help="The node's folder, or its --records folder.", metavar="NODE")
]


def check(
    experiment: Annotated[
        str,
        typer.Argument(
            help="A shipped experiment or a YAML file.", autocompletion=complete_experiment
        ),
    ],
    policy: Annotated[Path, typer.Option("--policy", help="The node's policy file.")],
    overrides: Overrides = None,
) -> None:
    """Say whether a node with this policy would answer an experiment, and if not, why."""
    from fedprompt.deploy.governance.policy import objections, read_policy
    from fedprompt.experiment.compose import compose

    rules, digest = read_policy(policy)
    found = objections(rules, compose(experiment, overrides or []))
    for reason in found:
        print(f"no: {reason}")
    if found:
        raise typer.Exit(1)
    print(f"yes: the policy {digest[:16]} allows this experiment")
    print("the node itself checks its replies, its data, its ledger and the time of day")


def ledger(
    node: NodePath,
    delta: Annotated[
        float, typer.Option("--delta", help="The delta that epsilon is given for.")
    ] = 1e-5,
) -> None:
    """Show how much privacy a node's data have spent, over all experiments."""
    from fedprompt.deploy.governance.ledger import spent_epsilon, spent_image_epsilon

    if not 0 < delta < 1:
        raise UserError(f"--delta is {delta:g}; it must be between 0 and 1.")
    spent = spent_epsilon(_records(node), delta)
    for data, (releases, epsilon) in spent.items():
        print(f"{data}: {releases} releases, epsilon {epsilon:.4g} at delta {delta:g}")
    images = spent_image_epsilon(_records(node), delta)
    for data, (releases, epsilon) in images.items():
        print(
            f"{data}, single images: {releases} releases, epsilon {epsilon:.4g} at delta {delta:g}"
        )
    if not spent and not images:
        print("nothing has been spent")


@audit_app.command()
def verify(
    node: NodePath,
    known: Annotated[
        str | None,
        typer.Option("--hash", help="Hash of an entry that must be there, e.g. of sites.json."),
    ] = None,
) -> None:
    """Check that no entry of audit log and ledger has been changed, removed or added."""
    from fedprompt.deploy.governance import audit, ledger
    from fedprompt.deploy.governance.journal import verify

    folder = _records(node)
    entries = verify(folder / audit.FILE, audit.WHAT, known)
    spent = verify(folder / ledger.FILE, ledger.WHAT)
    print(f"audit log: {len(entries)} entries, unchanged")
    print(f"privacy ledger: {len(spent)} entries, unchanged")
    if entries:
        print(f"last hash of the audit log: {entries[-1]['hash']}")


@audit_app.command()
def statement(
    node: NodePath,
    run: Annotated[
        str | None, typer.Option("--run", help="Only this run (default: all runs).")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="File to write (default: standard output).")
    ] = None,
) -> None:
    """Write what has left a node, in one page of Markdown."""
    from fedprompt.deploy.governance import audit
    from fedprompt.deploy.governance.journal import verify
    from fedprompt.files import write_bytes

    page = audit.egress_statement(verify(_records(node) / audit.FILE, audit.WHAT), run)
    if out is None:
        print(page, end="")
        return
    try:
        write_bytes(out, page.encode())
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}.") from None
    print(f"wrote {out}")


def _records(node: Path) -> Path:
    """The folder with a node's records."""
    for folder in (node / "records", node):
        if any(folder.glob("*.jsonl")):
            return folder
    raise UserError(f"{node} holds no records of a node; give its folder, or that of --records.")
