"""The result files that the documentation publishes can be compared with new ones."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from fedprompt.leaderboard.collect import collect
from fedprompt.suites.load import load_suite, suite_path
from tests.support.doc_pages import DOCS

FOLDERS = sorted((DOCS / "result_files").iterdir())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_published_results_are_those_of_the_shipped_suite(folder: Path) -> None:
    """If this fails, the suite has changed under its name: it needs a new version."""
    suite = load_suite(suite_path(folder.name))
    (found,), refused = collect([folder])
    assert refused == []
    assert len(found.entries) == len(list(folder.iterdir())) > 1
    for entry in found.entries:
        result = entry.result
        assert (result.suite, result.suite_hash) == (suite.name, suite.hash)
        assert result.row in suite.rows
        assert set(result.scenarios) == set(suite.scenarios)


def test_the_table_of_the_page_is_that_of_the_files() -> None:
    """Scores of docs/results.md against the mean over the files' scenarios and seeds."""
    (found,), _ = collect([DOCS / "result_files" / "scenes-v1"])
    page = (DOCS / "results.md").read_text()
    section = page.split("## Tuned: scenes-v1")[1].split("\n## ")[0]
    lines = [line.strip("|") for line in section.splitlines() if line.startswith("| ")]
    rows = {cells[0].strip(): cells[1] for cells in csv.reader(lines[1:], delimiter="|")}
    assert len(rows) == len(found.entries)
    for entry in found.entries:
        tuned = [scenario.tuned for scenario in entry.result.scenarios.values()]
        means = [sum(s.value for s in t.seeds.values()) / len(t.seeds) for t in tuned if t]
        score = rows[entry.result.row].strip(" *").split(" ")[0]
        assert f"{100 * sum(means) / len(means):.1f}" == score
