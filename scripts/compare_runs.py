"""One protocol's results of several runs in one table and figure.

    python scripts/compare_runs.py few_shot runs/few_shot/*-seed1 [--out few_shot.png]

Protocols that can be compared are those of which a run is one point: few_shot (a curve over shots),
leave_one_domain_out (each domain in turn).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fedprompt.errors import UserError
from fedprompt.plots import save
from fedprompt.protocols import compare_runs
from fedprompt.run_data import load_run


def main() -> None:
    """Print the table as Markdown and write the figure."""
    parser = argparse.ArgumentParser(description="Compare runs of one protocol.")
    parser.add_argument("protocol", help="few_shot or leave_one_domain_out")
    parser.add_argument("runs", type=Path, nargs="+", help="finished run folders")
    parser.add_argument("--out", type=Path, help="PNG file to write [<protocol>.png]")
    arguments = parser.parse_args()
    runs = [load_run(path) for path in arguments.runs]
    table, figure = compare_runs(arguments.protocol, runs)
    out = arguments.out or Path(f"{arguments.protocol}.png")
    save(figure, out)
    print(f"{table.markdown()}\n\n{table.note}\nfigure: {out}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.stderr.write(f"compare_runs: {error}\n")
        sys.exit(2)
