"""The floors of the package: imports go down, never in a circle, and stand at the top of a file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.support import ROOT

FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "rng", "messages", "runtime", "statistics", "hub"),
    ("config", "files"),
    ("backbone",),
    ("data",),
    ("methods", "reports"),
    ("optimizer", "training", "scoring", "workspace"),
    ("privacy",),
    ("evaluation",),
    ("federation",),
    ("simulation", "strategies"),
    ("experiment",),
    ("deploy", "sweeps"),
    ("tuning",),
    ("suites", "leaderboard"),
    ("cli", "bench", "__init__", "__main__"),
    ("scripts",),
)
LATE = ("cli/", "bench/", "simulation/ray_worker.py", "sweeps/worker.py", "deploy/client_app.py")
"""Where our own imports may stand in a function, to keep the start-up fast."""
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def files() -> dict[str, Path]:
    """Every source file by its module name; strategies under the name they are imported by."""
    found = {}
    for path in sorted((ROOT / "fedprompt").rglob("*.py")):
        found[".".join(path.relative_to(ROOT).with_suffix("").parts)] = path
    for path in sorted((ROOT / "strategies").glob("*.py")):
        found[f"fedprompt.strategies.{path.stem}"] = path
    return {name.removesuffix(".__init__"): path for name, path in found.items()}


FILES = files()


def nodes(tree: ast.AST, late: bool = False) -> Iterator[tuple[ast.stmt, bool]]:
    """Every statement below a node, and whether it stands in a function."""
    late = late or isinstance(tree, (ast.FunctionDef, ast.AsyncFunctionDef))
    for node in ast.iter_child_nodes(tree):
        # Nothing below an expression is an import.
        if not isinstance(node, ast.expr):
            if isinstance(node, ast.stmt):
                yield node, late
            yield from nodes(node, late)


def imports(module: str) -> Iterator[tuple[str, bool]]:
    """The modules of ours that a module imports, and whether it does so in a function."""
    for node, late in nodes(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(module.split(".")[: -node.level]) if node.level else ""
            base = ".".join(part for part in (package, node.module) if part)
            names = [f"{base}.{alias.name}" for alias in node.names]
            names = [name if name in FILES else base for name in names]
        for name in sorted(set(names)):
            # The package itself runs before anything in it, and holds its version.
            if name in FILES and name not in (module, "fedprompt"):
                yield name, late


@cache
def graph() -> dict[str, list[tuple[str, bool]]]:
    return {module: list(imports(module)) for module in FILES}


def floor(module: str) -> int:
    """The floor of a module, counted from the ground."""
    parts = module.split(".")
    return FLOOR_OF[parts[1] if len(parts) > 1 else "__init__"]


def test_no_import_goes_up() -> None:
    up = [(m, n) for m, found in graph().items() for n, _ in found if floor(n) > floor(m)]
    assert not up


def test_no_import_of_ours_hides_in_a_function() -> None:
    hidden = [
        (m, n)
        for m, found in graph().items()
        for n, late in found
        if late and not str(FILES[m].relative_to(ROOT / "fedprompt")).startswith(LATE)
    ]
    assert not hidden


def test_no_circle() -> None:
    done: set[str] = set()

    def round_info(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"circle: {' -> '.join([*path, module])}"
        if module in done:
            return
        for name, _ in graph()[module]:
            round_info(name, (*path, module))
        done.add(module)

    for module in graph():
        round_info(module, ())


def test_few_loose_modules() -> None:
    loose = [p.stem for p in (ROOT / "fedprompt").glob("*.py") if not p.stem.startswith("__")]
    assert len(loose) <= 8, loose
