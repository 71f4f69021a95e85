"""Fresh environments with this package installed from a wheel or editably, without a network."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import Literal

import pytest

from tests.support import ROOT

FLOWER_COMMANDS = ("flwr*", "flower-*")


def build_wheel(folder: Path, kind: Literal["wheel", "editable"] = "wheel") -> Path:
    """Build this checkout as pip would, with the build backend of pyproject.toml."""
    pytest.importorskip("hatchling", reason="the build backend is not installed")
    code = f"from hatchling.build import build_{kind}; print(build_{kind}({str(folder)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.split()[-1]


class Environment:
    """A virtual environment that has this package, and everything else from the present one.

    Args:
        folder: where to create it.
        kind: how the package is installed.
    """

    def __init__(self, folder: Path, kind: Literal["wheel", "editable"]) -> None:
        self.kind = kind
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
        self.python = folder / "venv" / "bin" / "python"
        (self.packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
        with zipfile.ZipFile(build_wheel(folder, kind)) as wheel:
            wheel.extractall(self.packages)
        # A path that stands in a .pth file is not searched for .pth files in turn, so the present
        # environment's own installation of this package is not seen.
        (self.packages / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n")

    def add_flower_commands(self) -> None:
        """Copy Flower's commands, so that they run in this environment."""
        for pattern in FLOWER_COMMANDS:
            for command in Path(sys.executable).parent.glob(pattern):
                lines = command.read_text().splitlines(keepends=True)
                copy = self.python.parent / command.name
                copy.write_text("".join([f"#!{self.python}\n", *lines[1:]]))
                copy.chmod(0o755)

    def run(self, *arguments: object, cwd: Path, **environment: str) -> str:
        """Run Python with these arguments; returns its standard output."""
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(
            [self.python, *map(str, arguments)],
            cwd=cwd,
            env={**inherited, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout
