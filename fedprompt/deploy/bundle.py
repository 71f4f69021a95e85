"""The Flower app that `deploy run` submits to the SuperLink. Runs on the administrator's terminal.

Flower sends the code of a submitted app to the nodes and runs it there. Our app consists of two
import statements only, so that a node runs the `fedprompt` that its own administrator has
installed, and no code crosses the network.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from fedprompt import __version__

PACKAGE = "fedprompt_deployment"
# `dependencies` stays empty, because `flwr run` installs them with `uv sync` for every run, which
# fails offline. Flower accepts only run-config keys that are listed here.
PROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "fedprompt-deployment"
version = "{version}"
description = "Names the fedprompt that is installed on each machine."
license = "Apache-2.0"
dependencies = []

[tool.hatch.build.targets.wheel]
packages = ["{package}"]

[tool.flwr.app]
publisher = "fedprompt"

[tool.flwr.app.components]
serverapp = "{package}.server:app"
clientapp = "{package}.client:app"

[tool.flwr.app.config]
config = ""
run = ""
versions = ""
"""


def write_bundle(folder: Path) -> Path:
    """Write the app that `flwr run` submits.

    Args:
        folder: where the app's `pyproject.toml` and package are written; existing files are
            replaced.

    Returns:
        `folder`.
    """
    package = folder / PACKAGE
    package.mkdir(parents=True, exist_ok=True)
    (folder / "pyproject.toml").write_text(PROJECT.format(version=__version__, package=PACKAGE))
    (package / "__init__.py").write_text('"""See fedprompt.deploy."""\n')
    for side in ("client", "server"):
        module = f"fedprompt.deploy.{side}_app"
        code = f'"""See {module}."""\n\nfrom {module} import app\n'
        (package / f"{side}.py").write_text(f'{code}\n__all__ = ["app"]\n')
    return folder


def write_run_config(path: Path, settings: Mapping[str, str]) -> None:
    """Write Flower's `--run-config` file.

    Args:
        path: the TOML file.
        settings: values by key; the keys must be those that `PROJECT` lists.
    """
    # A JSON string is also a TOML basic string, so no TOML writer is needed.
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in settings.items()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
