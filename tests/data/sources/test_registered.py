"""A data source of another distribution: found, composed and opened by the name it registers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fedprompt.config.schema import to_yaml
from fedprompt.data import open_dataset
from fedprompt.data.sources.registry import SOURCES
from fedprompt.errors import UserError
from fedprompt.experiment.compose import compose
from tests.support.distributions import write_distribution

STRIPES = """
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from fedprompt.config.fields import option
from fedprompt.config.schema import DataConfig
from fedprompt.data.dataset import TEST, TRAIN, ImageDataset
from fedprompt.data.sources.base import DataSource


@dataclass(frozen=True)
class StripesConfig(DataConfig):
    source: Literal["stripes"] = option("stripes", "the data source")
    per_class: int = option(4, "images per class", ge=2)


def draw(index: int) -> Image.Image:
    return Image.new("RGB", (32, 32), (index, 0, 0))


class Stripes(DataSource):
    name = "stripes"
    Config = StripesConfig

    @staticmethod
    def load(config: StripesConfig, seed: int, cache_dir: Path) -> ImageDataset:
        n = 2 * config.per_class
        split_N = np.full(n, TRAIN, dtype=np.int8)
        split_N[:2] = TEST
        labels_N = np.arange(n, dtype=np.int64) % 2
        return ImageDataset(
            config.title, ("wide", "narrow"), labels_N, split_N, np.zeros_like(labels_N),
            ("stripes",), f"stripes {n}", draw,
        )
"""


@pytest.fixture
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package that adds the source `stripes`, and tries to replace one of ours."""
    write_distribution(
        tmp_path / "site",
        "stripes-paper",
        {"stripes_paper/__init__.py": "", "stripes_paper/images.py": STRIPES},
        {
            "fedprompt.data.sources": {
                "stripes": "stripes_paper.images:Stripes",
                "folder": "stripes_paper.images:Stripes",
            }
        },
    )
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield
    for module in ("stripes_paper.images", "stripes_paper"):
        sys.modules.pop(module, None)


def test_a_registered_source_is_listed_and_replaces_none_of_ours(distribution: None) -> None:
    assert "stripes" in SOURCES.names()
    assert SOURCES.added() == ["stripes"]
    assert SOURCES.get("folder").__module__ == "fedprompt.data.sources.folder"


def test_a_registered_source_composes_and_opens(distribution: None, tmp_path: Path) -> None:
    config = compose("label_skew", ["data.source=stripes", "data.per_class=6"])
    assert (config.data.source, config.data.per_class) == ("stripes", 6)
    dataset = open_dataset(config.data, config.seed, tmp_path / "cache")
    assert dataset.class_names == ("wide", "narrow")
    assert np.bincount(dataset.labels_N).tolist() == [6, 6]
    assert dataset.open_image(9).getpixel((0, 0)) == (9, 0, 0)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert compose(tmp_path / "config.yaml") == config


def test_the_keys_of_a_registered_source_are_checked(distribution: None) -> None:
    with pytest.raises(UserError, match=r"data\.per_class"):
        compose("label_skew", ["data.source=stripes", "data.per_class=1"])
    with pytest.raises(UserError, match="per_clas"):
        compose("label_skew", ["data.source=stripes", "data.per_clas=3"])


def test_without_its_distribution_the_source_is_unknown() -> None:
    with pytest.raises(UserError, match="stripes"):
        compose("label_skew", ["data.source=stripes"])
