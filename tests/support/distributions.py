"""Distributions as `pip` would install them, written by hand so that no test needs a network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def write_distribution(
    folder: Path, name: str, files: Mapping[str, str], entry_points: Mapping[str, Mapping[str, str]]
) -> None:
    """Install a distribution into a folder that is, or will be, on `sys.path`.

    Args:
        folder: plays the part of `site-packages`.
        name: the distribution's name.
        files: source code by path within the folder.
        entry_points: for each group, the object reference (`module:Class`) of each name.
    """
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = []
    for group, references in entry_points.items():
        lines.append(f"[{group}]")
        lines += [f"{key} = {reference}" for key, reference in references.items()]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
