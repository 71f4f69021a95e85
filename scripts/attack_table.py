"""Accuracy of the global model by share of attackers and strategy, as Markdown.

    python scripts/attack_table.py configs/sweep/attacks.yaml [--seeds 1] [--shares 0 0.3]
        [--rows FedAvg "Multi-Krum"] [key=value ...]

The file is one of run_table's with `shares` besides. Other attacks: `attack.kind=label_flip
attack.scale=10`. The row "without the attackers' replies" is what no rule can beat by leaving
attackers out: FedAvg where these send NaN, which is refused. Finished runs are kept.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from omegaconf import OmegaConf
from run_table import cell, load_table, row_config, summary_of

from fedprompt.errors import UserError

REFUSED = "without the attackers' replies"


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description="Accuracy by share of attackers and strategy.")
    parser.add_argument("table", type=Path, help="e.g. configs/sweep/attacks.yaml")
    parser.add_argument("overrides", nargs="*", help="changes to every run, key=value")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--shares", type=float, nargs="+")
    parser.add_argument("--rows", nargs="+", help="some of the table's rows")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_intermixed_args()
    table = load_table(arguments.table)
    shares = arguments.shares or list(OmegaConf.load(arguments.table)["shares"])
    seeds = arguments.seeds or table.seeds
    out = arguments.out or Path("runs") / arguments.table.stem
    table.rows[REFUSED] = ["strategy=fedavg", "attack.kind=nan"]
    unknown = sorted(set(arguments.rows or []) - set(table.rows))
    if unknown:
        raise UserError(f"no row {unknown[0]!r} in {arguments.table}.")
    print(f"| strategy | {' | '.join(f'{100 * s:g} %' for s in shares)} |")
    print("|---" * (len(shares) + 1) + "|")
    for name in arguments.rows or table.rows:
        cells = []
        for share in shares:
            # The row's own attack comes last: "refused" stays so whatever the overrides say.
            extra = [*arguments.overrides, *table.rows[name], f"attack.share={share}"]
            stem = re.sub(r"[^\w.]+", "-", " ".join([name, *arguments.overrides]).lower())
            folders = [out / f"{stem}-{share:g}-seed{seed}" for seed in seeds]
            runs = [
                summary_of(row_config(table, name, seed, extra, folder), folder)
                for seed, folder in zip(seeds, folders, strict=True)
            ]
            cells.append(cell([run["global"]["accuracy"] for run in runs]))
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.stderr.write(f"attack_table: {error}\n")
        sys.exit(2)
