"""The documentation says what is there: generated pages, commands, names, links."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import nbformat
import open_clip
import pytest
import typer
from click.exceptions import ClickException, Exit

from fedprompt.cli.generated_files import BACKBONE_PAGE, generated_files
from fedprompt.cli.main import app
from fedprompt.config.schema import PartitionConfig
from fedprompt.data.sections import available
from fedprompt.evaluation.registry import all_protocols
from fedprompt.experiment.compose import compose
from fedprompt.experiment.trackers import LOGGERS
from scripts.notebook_page import notebook_markdown
from tests.support.doc_pages import DOCS, PAGES, ROOT, blocks, commands, links

INVENTED = {
    "array_file", "coastal_scenes", "task_res", "geometric_median", "top_k", "protocol_top_k",
}  # fmt: skip
"""Names of the examples that readers are to add themselves."""
GENERATED = generated_files(ROOT)
MADE = re.compile(r"(commands|notebook|api/(methods|strategies|protocols))\.md")
"""Pages that only the site has."""
COMMAND = typer.main.get_command(app)
TAKES_EXPERIMENT = ("run", "data show", "data sheet", "data partition")


@pytest.mark.parametrize("name", GENERATED)
def test_generated_files_are_up_to_date(name: str) -> None:
    text = (ROOT / name).read_text()
    if name == BACKBONE_PAGE and f"open_clip {open_clip.__version__} " not in text:
        pytest.skip("the page lists the architectures of another version of open_clip")
    assert text == GENERATED[name](), "run 'make docs-pages'"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_understood(page: Path) -> None:
    for command in commands(page):
        words = shlex.split(command.partition(" > ")[0], comments=True)[1:]
        if not INVENTED & set(re.split(r"\W+", command)):
            understood(words, command)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_of_the_repository_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(
        r"(?<![\w/.-])((?:tests|fedprompt|strategies|scripts)/[\w./-]+)", page.read_text()
    )
    for name in {n.rstrip(".") for n in named}:
        if not INVENTED & set(re.split(r"[/.]|test_", name)):
            assert (ROOT / name).exists(), name


def understood(words: list[str], command: str) -> None:
    """Parses a command as the program would, and composes its config, but does not run it."""
    node = COMMAND
    path = ""
    while hasattr(node, "commands") and words and not words[0].startswith("-"):
        assert words[0] in node.commands, f"no such command: {command}"
        node = node.commands[words[0]]
        path = f"{path} {words.pop(0)}".strip()
    if not words or hasattr(node, "commands"):
        return
    try:
        context = node.make_context(path, list(words))
    except Exit:  # --help
        return
    except ClickException as error:
        pytest.fail(f"{command}: {error.format_message()}")
    values = context.params
    experiment = values.get("experiment") or values.get("what")
    changes = values.get("overrides") or []
    if path in TAKES_EXPERIMENT and experiment in available("experiment"):
        if not any(change.startswith("metod=") for change in changes):  # shown as a mistake
            compose(experiment, changes)


def test_a_wrong_command_is_noticed() -> None:
    with pytest.raises(AssertionError, match="no such command"):
        understood(["rum", "quickstart"], "fedprompt rum quickstart")
    with pytest.raises(pytest.fail.Exception, match="--quit"):
        understood(["run", "quickstart", "--quit"], "fedprompt run quickstart --quit")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in links(page):
        path, _, anchor = target.partition("#")
        if MADE.search(path):
            continue
        found = (page.parent / path).resolve()
        assert found.exists(), f"{page.name}: {target}"
        if anchor and found.suffix == ".md":
            assert anchor in anchors(found), f"{page.name}: {target}"


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as mkdocs and GitHub make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("protocols.md", sorted(all_protocols())),
        ("partitions.md", get_args(get_type_hints(PartitionConfig)["scheme"])),
        ("trackers.md", sorted(LOGGERS)),
    ],
)
def test_tables_name_everything_there_is(page: str, names: list[str]) -> None:
    rows = re.findall(r"^\| `(\w+)` \|", (DOCS / page).read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(names)


def test_every_page_is_in_the_site() -> None:
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    listed = set(re.findall(r": ([\w/]+\.md)$", nav, re.MULTILINE))
    there = {str(page.relative_to(DOCS)) for page in PAGES if page.is_relative_to(DOCS)}
    assert {name for name in listed if not MADE.fullmatch(name)} == there


def test_the_sites_page_shows_the_whole_notebook() -> None:
    text = notebook_markdown(DOCS / "quickstart.ipynb")
    cells = nbformat.read(DOCS / "quickstart.ipynb", as_version=4).cells
    title, *_ = cells[0].source.splitlines()
    assert text.startswith(f"{title}\n\n[Download this notebook](quickstart.ipynb)")
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    assert all(f"```python\n{c.source}\n```" in text for c in cells if c.cell_type == "code")
    assert all(o.text.rstrip("\n") in text for o in outputs if o.output_type == "stream")
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    assert text.count("](data:image/png;base64,") == pictures > 0


def test_blocks_that_are_run_hold_no_placeholder() -> None:
    for page in PAGES:
        for block in blocks(page):
            if block.language == "bash" and page.parent == DOCS:
                assert "/path/" not in block.text, page.name


@pytest.mark.slow
def test_the_site_is_built_and_needs_no_network(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the extra 'docs' is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        html = page.read_text()
        fetched = re.findall(r"<(?:script|img|iframe)[^>]* src=\"?(http[^\" >]+)", html)
        fetched += re.findall(r"<link[^>]* href=\"?(http[^\" >]+)[^>]*>", html)
        assert fetched == [], f"{page.name} fetches {fetched}"
    assert "fedrsclip" in (tmp_path / "api" / "methods.html").read_text()
    assert "fedprompt sweep" in (tmp_path / "commands.html").read_text()
    assert "data:image/png" in (tmp_path / "notebook.html").read_text()


def test_the_page_about_the_code_names_places_that_exist() -> None:
    page = (DOCS / "code.md").read_text()
    for place in re.findall(r"`((?:fedprompt|strategies|scripts|tests)/[\w/.]*)`", page):
        assert (ROOT / place).exists() or (ROOT / f"{place}.py").exists(), place
