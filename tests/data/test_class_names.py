from __future__ import annotations

from pathlib import Path

import pytest

from fedprompt.data import open_dataset
from fedprompt.data.sources.folder import FolderConfig
from fedprompt.errors import UserError
from tests.support.fake_data import write_image_folder


@pytest.mark.parametrize("name", ["", "  ", "\u200b", "\u2060\ufeff"])
def test_a_name_without_a_visible_character_is_refused(name: str, tmp_path: Path) -> None:
    root = write_image_folder(tmp_path / "root", {"__": 0, "a": 1, "_": 1})
    assert len(open_dataset(FolderConfig(root=str(root), class_names=["_", "a"]), 1)) == 2
    write_image_folder(tmp_path / "other", {"a": 1, name or "-": 1})
    config = FolderConfig(root=str(tmp_path / "other"), class_names=["a", name])
    with pytest.raises(UserError, match=r"name of class 1 is .* no visible character"):
        open_dataset(config, 1, tmp_path / "cache")
