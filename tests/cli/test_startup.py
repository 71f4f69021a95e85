"""Commands that print names answer quickly: they do not import the libraries that take seconds."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

import fedprompt
from fedprompt.runtime import many_imports
from tests.support import ROOT

SLOW = ("torch", "open_clip", "datasets", "flwr", "ray", "matplotlib", "scipy")
COMMAND = """
import sys

sys.argv = ["fedprompt", *{arguments!r}]
from fedprompt.cli.main import main

try:
    main()
except SystemExit as stopped:
    assert not stopped.code, stopped.code
sys.stderr.write(" ".join(name for name in {slow!r} if name in sys.modules))
"""


def imported(code: str, folder: Path, **environment: str) -> tuple[str, str]:
    """Standard output and the slow libraries that are imported after the code has run."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["list"], "quickstart"),
        (["methods"], "2,048"),
        (["methods", "--markdown"], "| fedrsclip |"),
        (["data", "list"], "eurosat"),
        (["--version"], fedprompt.__version__),
        (["--help"], "run"),
        (["run", "--help"], "quickstart"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_commands_that_print_names(arguments: list[str], expected: str, tmp_path: Path) -> None:
    out, slow = imported(COMMAND.format(arguments=arguments, slow=SLOW), tmp_path)
    assert expected in out
    assert slow == ""


@pytest.mark.parametrize(
    ("line", "offer"),
    [
        ("fedprompt run quicks", "quickstart"),
        ("fedprompt run quickstart method=promptf", "method=promptfl"),
        ("fedprompt run quickstart training.opt", "training.optimizer="),
        ("fedprompt compare runs --protocol calib", "calibration"),
        ("fedprompt data show euros", "eurosat"),
    ],
)
def test_completion(line: str, offer: str, tmp_path: Path) -> None:
    out, slow = imported(
        COMMAND.format(arguments=[], slow=SLOW),
        tmp_path,
        _FEDPROMPT_COMPLETE="complete_fish",
        _TYPER_COMPLETE_ARGS=line,
        _TYPER_COMPLETE_FISH_ACTION="get-args",
    )
    assert offer in out.split()
    assert slow == ""


@pytest.mark.parametrize("enabled", [True, False])
def test_no_garbage_is_looked_for_during_many_imports(enabled: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with suppress(ImportError), many_imports():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()


def test_a_run_says_what_it_loads_before_it_loads_it(tmp_path: Path) -> None:
    code = f"""
import sys
from fedprompt.cli.main import main
from fedprompt.experiment.display import PlainDisplay

def phase(display, text):
    print(text, *(name for name in {SLOW!r} if name in sys.modules), flush=True)
    raise SystemExit(0)

PlainDisplay.phase = phase
sys.argv = ["fedprompt", "run", "quickstart"]
main()
"""
    out, _ = imported(code, tmp_path)
    assert out.strip() == "loading PyTorch and Flower"
