"""Whoever follows the pages about adding something, and runs one command, has no failing test."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.doc_pages import source_files

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
COPIED = ("configs", "docs", "fedprompt", "scripts", "strategies", "tests")
ALWAYS = (
    "tests/docs/test_docs.py",
    "tests/sweeps/test_all_methods.py",
    "tests/cli/test_method_table.py",
    "tests/config",
    "tests/experiment/test_shipped.py",
    "tests/experiment/test_refusals.py",
    "tests/test_layers.py",
)
PAGES = {
    "new_method.md": ("tests/methods/contract", "task_res"),
    "new_strategy.md": ("tests/strategies/test_contract.py", "geometric_median"),
    "new_protocol.md": ("tests/evaluation", "top_k"),
    "new_dataset.md": ("tests/data", "coastal_scenes or array_file"),
}
"""The tests that a page names, and the names of its examples."""


def follow(page: str, checkout: Path) -> list[Path]:
    """Save the page's files where its numbered steps say; returns their paths."""
    text = (ROOT / "docs" / page).read_text()
    language = "yaml" if page == "new_dataset.md" else "python"
    blocks = re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    places = re.findall(r"`((?:fedprompt|strategies|configs)/[\w/<>]+\.(?:py|yaml))`", text)
    source = Path(places[0].replace("<name>", "coastal_scenes"))
    (checkout / source).write_text(blocks[0])
    written = [source]
    if language == "python":
        config = next(Path(place) for place in places if place.startswith("configs/"))
        inner = re.findall(r"^   ```yaml\n(.*?)^   ```", text, re.MULTILINE | re.DOTALL)[0]
        (checkout / config).write_text(re.sub(r"^   ", "", inner, flags=re.MULTILINE))
        written.append(config)
    else:
        maker = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[0]
        copies = checkout / "tests" / "support" / "published_copies.py"
        changed, number = re.subn(
            r"^(MAKERS.* = \{\n)", rf"\g<1>{maker}", copies.read_text(), flags=re.M
        )
        assert number == 1
        copies.write_text(changed)
        for path, block in source_files(text).items():
            (checkout / path).write_text(block)
            written.append(Path(path))
    return written


def test_following_the_pages_leaves_no_test_failing(tmp_path: Path) -> None:
    """All pages in one checkout: to collect the tests takes longer than to run them."""
    for name in COPIED:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT.glob("*.*"):
        if file.is_file():
            shutil.copy(file, tmp_path)
    shutil.copy(ROOT / "Makefile", tmp_path)
    written = [path for page in PAGES for path in follow(page, tmp_path)]
    assert len(written) == len(set(written))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    pytest_command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n0"]
    tests, names = zip(*PAGES.values(), strict=True)
    commands = [
        [sys.executable, "scripts/write_docs.py"],
        [*pytest_command, *ALWAYS],
        [*pytest_command, *tests, "-k", " or ".join(names)],
    ]
    for command in commands:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
