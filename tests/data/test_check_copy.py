"""Comparing the copy of a published data set with its entry in the catalogue."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedprompt.data import check_copy as checking
from fedprompt.data.catalogue import entry
from tests.support.published_copies import make
from tests.support.published_loading import load

pytestmark = pytest.mark.usefixtures("few_classes")


@pytest.mark.parametrize("name", ["dtd", "flowers102", "cifar10", "pacs"])
def test_check_counts_splits_domains_and_missing_files(name: str, tmp_path: Path) -> None:
    made = make(name, tmp_path / "copy")
    finding = checking.check(entry(name), tmp_path / "copy")
    rows = {row.what: row for row in finding.rows}
    assert rows["images"].found == len(made)
    assert rows["images"].stated == entry(name).images
    assert rows["classes with images"].ok
    assert not finding.ok
    if name == "pacs":
        assert rows["images of domain art painting"].found == 28
        return
    assert rows["test images"].found == sum(item.split == "test" for item in made)
    if name == "dtd":
        made[0].path.unlink()
        finding = checking.check(entry(name), tmp_path / "copy")
        assert finding.problems == (f"missing file: banded/{made[0].path.name}",)


@pytest.mark.parametrize(
    ("name", "theirs", "other"),
    [
        ("mlrsnet", "harbor&port", "harbor_port"),
        ("millionaid", "basketball_court", "bapsketball_court"),
    ],
)
def test_other_spellings_of_folders_are_the_same_classes(
    name: str, theirs: str, other: str, tmp_path: Path
) -> None:
    made = make(name, tmp_path / "copy")
    folder = next(item.path.parent for item in made if item.key == theirs)
    before = load(name, tmp_path / "copy")
    folder.rename(folder.with_name(other))
    finding = checking.check(entry(name), tmp_path / "copy")
    assert not finding.problems
    assert {row.what: row for row in finding.rows}["classes with images"].ok
    assert load(name, tmp_path / "copy").class_names == before.class_names
    folder.with_name(other).rename(folder.with_name("teapots"))
    assert "unknown class 'teapots'" in checking.check(entry(name), tmp_path / "copy").problems
