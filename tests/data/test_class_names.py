from __future__ import annotations

from pathlib import Path

import pytest

from fedprompt.data import open_dataset
from fedprompt.data.class_names import refuse_invisible
from fedprompt.data.sources.folder import FolderConfig
from fedprompt.errors import UserError
from tests.support.fake_data import write_image_folder


@pytest.mark.parametrize("name", ["", "  ", "\u200b", "\u2060\ufeff", "\u3164", "\u2800", "\ufe0f"])
def test_a_name_without_a_visible_character_is_refused(name: str, tmp_path: Path) -> None:
    root = write_image_folder(tmp_path / "root", {"__": 0, "a": 1, "_": 1})
    assert len(open_dataset(FolderConfig(root=str(root), class_names=["_", "a"]), 1)) == 2
    write_image_folder(tmp_path / "other", {"a": 1, name or "-": 1})
    config = FolderConfig(root=str(tmp_path / "other"), class_names=["a", name])
    with pytest.raises(UserError, match=r"name of class 1 is .* no visible character"):
        open_dataset(config, 1, tmp_path / "cache")


@pytest.mark.parametrize("letter", ["\u00ad", "\u200b", "\u200e", "\u202e", "\ufeff", "\x1b"])
def test_an_invisible_character_within_a_name_is_named(letter: str) -> None:
    with pytest.raises(UserError, match=f"class 1 is .* U[+]{ord(letter):04X}") as caught:
        refuse_invisible(["coop", f"co{letter}op"], "shops")
    assert str(caught.value).isprintable()


def test_joiners_of_scripts_and_spaces_of_all_kinds_are_part_of_a_name() -> None:
    refuse_invisible(
        ["\u0645\u06cc\u200c\u062e", "\u2764\ufe0f", "ice\u00a0cream", "a\u3000b"], "shops"
    )
