"""The commands of the documentation, run as they stand: blocks of `bash`, page by page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.support.doc_pages import DOCS, blocks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
RUN = ["tutorial", "experiments", "datasets", "partitions", "protocols", "sweeps", "clusters"]
NOTEBOOK = DOCS / "quickstart.ipynb"


def follow(page: str, folder: Path) -> str:
    """Write the page's titled files, do its commands in order; what they print."""
    folder.mkdir(exist_ok=True)
    commands = []
    for block in blocks(DOCS / f"{page}.md"):
        if block.title:
            (folder / block.title).write_text(block.text)
        elif block.language == "bash":
            commands.append(block.text)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(commands)],
        cwd=folder,
        env={**os.environ, "PATH": path, "COLUMNS": "120"},
        capture_output=True,
        text=True,
    )
    assert commands
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("page", RUN)
def test_the_page_can_be_followed(page: str, tmp_path: Path) -> None:
    out = follow(page, tmp_path)
    assert "Traceback" not in out
    if page == "tutorial":
        ends_in_a_table(tmp_path)


def ends_in_a_table(folder: Path) -> None:
    """The LaTeX table has the three rows, and the numbers that the runs' summaries give."""
    tex = (folder / "methods.tex").read_text()
    assert r"\begin{tabular}" in tex
    assert r"\toprule" in tex
    rows = {line.split(" & ")[0].strip(): line for line in tex.splitlines() if " & " in line}
    for row, method in (("Zero-shot CLIP", "zero-shot-clip"), ("PromptFL", "promptfl")):
        found = [
            json.loads(path.read_text())["global"]["accuracy"]
            for path in (folder / "runs" / "methods").glob(f"{method}-seed*/summary.json")
        ]
        assert len(found) == 3
        assert f"{100 * sum(found) / 3:.1f} $\\pm$" in rows[row]
    assert (folder / "tables" / "table.csv").is_file()


def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()


def test_the_notebooks_outputs_are_of_one_run() -> None:
    cells = [c for c in nbformat.read(NOTEBOOK, as_version=4).cells if c.cell_type == "code"]
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    shown = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in shown)
    assert not [output for output in shown if output.output_type == "error"]
    assert not [output for output in shown if output.get("name") == "stderr"]
