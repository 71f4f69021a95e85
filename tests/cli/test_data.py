"""The commands `fedprompt data list`, `show`, `check` and `prepare`."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import pytest
import yaml

from fedprompt.cli import main as cli
from fedprompt.data import catalogue
from fedprompt.data.catalogue import entry
from tests.support.fake_data import truncated
from tests.support.published_copies import make
from tests.support.published_loading import NAMES

pytestmark = pytest.mark.usefixtures("few_classes")


def run(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *arguments: object,
    width: int = 200,
) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["fedprompt", "data", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out, err


def test_list_and_show(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(monkeypatch, capsys, "list", width=80)
    assert status == 0
    assert "…" not in out.split("natural")[0], "all is readable on 80 columns"
    assert "licence" not in out
    status, out, _ = run(monkeypatch, capsys, "list")
    assert "CC BY 4.0 (Mendeley Data)" in out
    assert all(name in out for name in NAMES)
    assert "27,000" in out
    status, out, _ = run(monkeypatch, capsys, "show", "whu_rs19")
    assert status == 0
    shown = yaml.safe_load(out)
    assert shown["classes"]["footballField"] == "football field"
    assert shown["cite"]["year"] == 2010
    status, _, err = run(monkeypatch, capsys, "show", "eurosta")
    assert status == 2
    assert "Did you mean 'eurosat'?" in err


def test_check_compares_and_exits_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "copy"
    made = make("eurosat", root)
    status, out, _ = run(monkeypatch, capsys, "check", "eurosat", "--root", root)
    assert status == 1
    assert re.search(r"images\W+27,000\W+40\W+differs", out)
    assert re.search(r"classes with images\W+10\W+10\W+ok", out)
    small = dataclasses.replace(entry("eurosat"), images=len(made))
    monkeypatch.setattr(catalogue, "entry", lambda name: small)
    assert run(monkeypatch, capsys, "check", "eurosat", "--root", root)[0] == 0
    shutil.rmtree(root / "2750" / "River")
    (root / "2750" / "River").mkdir()
    status, out, _ = run(monkeypatch, capsys, "check", "eurosat", "--root", root)
    assert status == 1
    assert "no image of class 'River'" in out
    (root / "2750" / "River").rename(root / "2750" / "Rivers")
    status, out, _ = run(monkeypatch, capsys, "check", "eurosat", "--root", root)
    assert status == 1
    assert "unknown class 'Rivers'" in out
    assert "no class 'River'" in out
    status, _, err = run(monkeypatch, capsys, "check", "eurosat", "--root", tmp_path / "none")
    assert status == 2
    assert "does not exist" in err


def test_prepare_reads_all_images_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "copy"
    made = make("rsscn7", root)
    made[2].path.write_bytes(truncated())
    arguments = ("prepare", "rsscn7", "--root", root, "--cache", tmp_path / "cache")
    status, out, _ = run(monkeypatch, capsys, *arguments)
    assert status == 0
    assert "27 images of 7 classes" in out
    assert str(made[2].path) in out
    assert list((tmp_path / "cache" / "scan").glob("*.journal"))
    status, _, err = run(monkeypatch, capsys, "prepare", "rsscn7")
    assert status == 2
    assert "give --root DIR" in err
