"""Write constraints/tested.txt: the installed versions, which the tests have passed with.

    python scripts/write_constraints.py

The file holds names and upper bounds only. Packages that belong to one platform (the libraries of
CUDA) and the tools of the environment itself are left out.
"""

from __future__ import annotations

import re
from importlib.metadata import distributions
from pathlib import Path

PATH = Path(__file__).parents[1] / "constraints" / "tested.txt"
LEFT_OUT = re.compile(r"(nvidia|cuda|triton|fedprompt|pip|setuptools|wheel|uv)\b", re.IGNORECASE)


def main() -> None:
    """Replace the bounds and keep the comment above them."""
    comment = [line for line in PATH.read_text().splitlines() if line.startswith("#")]
    versions = {d.metadata["Name"]: d.version.partition("+")[0] for d in distributions()}
    names = sorted((n for n in versions if not LEFT_OUT.match(n)), key=str.lower)
    lines = [*comment, *(f"{name}<={versions[name]}" for name in names)]
    PATH.write_text("\n".join(lines) + "\n")
    print(f"wrote {len(names)} bounds to {PATH}")


if __name__ == "__main__":
    main()
