"""Where the strategies are found, and that a package of somebody else's is never taken for them."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedprompt import strategies
from fedprompt.errors import UserError


def package_in(folder: Path, *files: str) -> Path:
    """An empty `fedprompt/strategies` in a folder that also holds some files."""
    for name in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    package = folder / "fedprompt" / "strategies"
    package.mkdir(parents=True, exist_ok=True)
    return package


def test_in_a_wheel_they_are_in_the_package(tmp_path: Path) -> None:
    package = package_in(tmp_path, "fedprompt/strategies/fedavg.py", "strategies/fedavg.py")
    assert strategies._folder(package) == package


def test_in_a_checkout_they_are_at_the_top_level(tmp_path: Path) -> None:
    package = package_in(tmp_path, "pyproject.toml", "strategies/fedavg.py")
    assert strategies._folder(package) == tmp_path / "strategies"


@pytest.mark.parametrize("files", [(), ("strategies/fedavg.py",), ("pyproject.toml",)])
def test_without_them_there_is_one_line(tmp_path: Path, files: tuple[str, ...]) -> None:
    package = package_in(tmp_path, *files)
    with pytest.raises(UserError) as refused:
        strategies._folder(package)
    assert str(package) in str(refused.value)
    assert "\n" not in str(refused.value)
