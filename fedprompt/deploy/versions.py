"""Whether a node and the server run versions that fit together. Used on both sides.

A node puts its versions into its first answer, whether it can take part or not. Versions of
fedprompt with the same major and minor number understand each other's messages. Other differences,
for example in PyTorch, can change results, so they are reported and nothing more.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata

from flwr.app import ConfigRecord, RecordDict
from packaging.version import InvalidVersion, Version

from fedprompt import __version__
from fedprompt.errors import UserError
from fedprompt.messages import Refused

VERSIONS = "versions"
"""Name of the record with a node's versions, and key of the server's version in the run config."""
PACKAGES = ("flwr", "torch")
"""Packages besides fedprompt whose versions a node reports."""
MAX_CHARACTERS = 60
ADVICE = "install the same version on both"


def own_versions() -> dict[str, str]:
    """The versions of fedprompt and `PACKAGES` on this machine."""
    # Read from the code and not from the installed distribution, which may be another one.
    return {"fedprompt": __version__, **{name: metadata.version(name) for name in PACKAGES}}


def versions_record() -> ConfigRecord:
    """The record that a node adds to its first answer."""
    return ConfigRecord({**own_versions()})


def read_versions(content: RecordDict) -> dict[str, str]:
    """Read a node's versions; every byte of them is untrusted.

    Args:
        content: a node's first answer.

    Returns:
        The versions by package.

    Raises:
        Refused: the node runs another major or minor version of fedprompt than this server, or
            does not say which.
    """
    record = content.get(VERSIONS)
    values = dict(record) if isinstance(record, ConfigRecord) else {}
    versions: dict[str, str] = {}
    for name in ("fedprompt", *PACKAGES):
        text = values.get(name)
        if isinstance(text, str) and _parsed(text) is not None:
            versions[name] = text
    theirs = versions.get("fedprompt")
    if theirs is None:
        raise Refused(
            "it does not say which version of fedprompt it runs, so it runs an older one than this "
            f"server; {ADVICE}"
        )
    if not _fit(theirs, __version__):
        raise Refused(f"it runs fedprompt {theirs}, but this server runs {__version__}; {ADVICE}")
    return versions


def version_warnings(versions: Mapping[str, str]) -> list[str]:
    """One line for each package of which a node runs another version than this machine."""
    return [
        f"it runs {name} {versions.get(name, 'of an unknown version')}, but this machine runs {own}"
        for name, own in own_versions().items()
        # Builds of one version for other processors differ in what follows a `+`.
        if versions.get(name, "").partition("+")[0] != own.partition("+")[0]
    ]


def check_server(version: str) -> None:
    """Check, on a node, the server's version of fedprompt.

    Args:
        version: the version in the run config; empty if the run was submitted without our command.

    Raises:
        UserError: the server runs another major or minor version than this node.
    """
    if version and not _fit(version, __version__):
        raise UserError(
            f"the server runs fedprompt {version[:MAX_CHARACTERS]}, but this node runs "
            f"{__version__}; {ADVICE}."
        )


def _fit(one: str, other: str) -> bool:
    first, second = _parsed(one), _parsed(other)
    return (
        first is not None
        and second is not None
        and (first.major, first.minor) == (second.major, second.minor)
    )


def _parsed(text: str) -> Version | None:
    try:
        return Version(text) if len(text) <= MAX_CHARACTERS else None
    except InvalidVersion:
        return None
