"""Write every file of this checkout that is generated from the code: `make docs-pages`."""

from __future__ import annotations

from pathlib import Path

from fedprompt.cli.generated_files import write_generated_files

if __name__ == "__main__":
    for name in write_generated_files(Path(__file__).resolve().parent.parent):
        print(f"wrote {name}")
