"""Files of sentences about classes: the shipped one, and what is wrong with others."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from fedprompt.config.shipped import shipped_names
from fedprompt.data.aerial_scenes import CLASSES
from fedprompt.data.descriptions import load_descriptions
from fedprompt.errors import UserError
from fedprompt.experiment.workspaces import ResourceCache, open_workspace
from tests.support.builders import small_config


@pytest.mark.parametrize("name", shipped_names("descriptions"))
def test_a_shipped_file_has_equally_many_different_sentences(name: str) -> None:
    found = dict(load_descriptions(name, ()))
    assert len({len(sentences) for sentences in found.values()}) == 1
    every = [s for sentences in found.values() for s in sentences]
    assert len(set(every)) == len(every)


def test_the_embedded_scenes_are_described() -> None:
    found = dict(load_descriptions("aerial_scenes", [c.replace(" ", "_") for c in CLASSES]))
    assert set(found) == set(CLASSES)
    assert load_descriptions(None, CLASSES) == ()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("river: [a river.]", "lake"),
        ("river: [a river.]\nlakes: [a lake.]", "lakes"),
        ("river: a river.\nlake: [a lake.]", "river"),
        ("river: []\nlake: [a lake.]", "river"),
        ("river: [1]\nlake: [a lake.]", "river"),
        ("- river", "file.yaml"),
        (None, "file.yaml"),
    ],
)
def test_a_mistake_is_named(text: str | None, named: str, tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as error:
        load_descriptions(str(path), ["river", "lake"])
    assert named in str(error.value)
    assert "data.descriptions" in str(error.value)


def test_an_unknown_name_is_named() -> None:
    with pytest.raises(UserError, match="aerial_scenes"):
        load_descriptions("arial_scenes", [])


def test_a_run_without_sentences_says_so(caplog: pytest.LogCaptureFixture) -> None:
    resources = ResourceCache()
    for name, file, lines in (
        ("biomedcoop", None, 1), ("biomedcoop", "aerial_scenes", 0), ("promptfl", None, 0),
    ):  # fmt: skip
        caplog.clear()
        config = small_config(
            method={"name": name},
            data={"images_per_class": 2, "domains": ["delta"], "descriptions": file},
            partition={"clients": 1},
        )
        with caplog.at_level(logging.WARNING, "fedprompt"):
            workspace = open_workspace(config, resources=resources)
        assert len([r for r in caplog.records if "data.descriptions" in r.message]) == lines
        assert bool(workspace.task.descriptions) == (file is not None)
