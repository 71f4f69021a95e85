"""Pages that are generated while mkdocs builds the site: commands, the API and the notebook."""

from __future__ import annotations

import pkgutil
from pathlib import Path

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from notebook_page import notebook_markdown  # mkdocs adds the folder of its hooks to the path
from typer.cli import get_docs_for_click

import fedprompt.evaluation.protocols
import fedprompt.methods
import fedprompt.strategies
from fedprompt.cli.main import app

API = {
    "methods": (
        fedprompt.methods,
        "One module per paper. The base class documents what a method can define.",
    ),
    "strategies": (
        fedprompt.strategies,
        "One module per strategy. The base class is in `fedprompt.federation.strategy`.",
    ),
    "protocols": (
        fedprompt.evaluation.protocols,
        "One module per protocol. The base class is in `fedprompt.evaluation.protocol`.",
    ),
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to those that are read from `docs/`."""
    files.append(File.generated(config, "commands.md", content=_commands()))
    notebook = notebook_markdown(Path(config.docs_dir) / "quickstart.ipynb")
    files.append(File.generated(config, "notebook.md", content=notebook))
    for name, (package, text) in API.items():
        modules = sorted(m.name for m in pkgutil.iter_modules(package.__path__))
        modules.sort(key=lambda module: module != "base")
        parts = [f"# {name.capitalize()}\n\n{text}\n"]
        # The site's reader of sources does not follow `fedprompt.strategies` to the top level.
        where = package.__name__.replace("fedprompt.strategies", "strategies")
        parts += [f"::: {where}.{module}\n" for module in modules]
        files.append(File.generated(config, f"api/{name}.md", content="\n".join(parts)))
    return files


def _commands() -> str:
    command = typer.main.get_command(app)
    context = typer.Context(command, info_name="fedprompt")
    return get_docs_for_click(obj=command, ctx=context, name="fedprompt", title="Commands")
