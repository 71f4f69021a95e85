"""Every command's `--help` shows what its arguments and options are for."""

from __future__ import annotations

import re
from collections.abc import Iterator

import click
import pytest
import typer
from typer.testing import CliRunner

from fedprompt.cli.main import app

WIDE = {"COLUMNS": "400", "TERM": "dumb", "NO_COLOR": "1"}


def tree(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every command and group."""
    yield path
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from tree(inner, (*path, name))


FEDPROMPT = typer.main.get_command(app)


def found(path: tuple[str, ...]) -> click.Command:
    command = FEDPROMPT
    for name in path:
        assert isinstance(command, click.Group)
        command = command.commands[name]
    return command


def words(text: str) -> str:
    """On one line; a bracket that is escaped for rich is a bracket."""
    return " ".join(text.replace("\\[", "[").split())


COMMANDS = list(tree(FEDPROMPT))


def test_the_whole_tree_is_looked_at() -> None:
    assert {(), ("run",), ("compare",), ("data", "show"), ("deploy", "local")} <= set(COMMANDS)


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: " ".join(path) or "fedprompt")
def test_arguments_options_and_commands_have_their_help(path: tuple[str, ...]) -> None:
    done = CliRunner().invoke(app, [*path, "--help"], env=WIDE)
    assert done.exit_code == 0
    shown = words(done.stdout.replace("│", " "))
    command = found(path)
    for parameter in command.params:
        told = getattr(parameter, "help", None)
        assert told, f"{parameter.name} has no help"
        assert words(told) in shown, parameter.name
        name = parameter.metavar if parameter.param_type_name == "argument" else parameter.opts[0]
        assert (name or str(parameter.name)) in shown
    for paragraph in re.split(r"\n\s*\n", command.help or ""):
        assert words(paragraph) in shown
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            first = re.split(r"\n\s*\n", inner.help or "")[0]
            assert first, f"{name} has no help"
            assert f"{name} {words(first)}" in shown
