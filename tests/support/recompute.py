"""The numbers of `fedprompt compare` once more, from metrics.jsonl and the sweep's plan alone.

Neither fedprompt nor NumPy nor SciPy is used: statistics and the t-distribution are written out.
By hand: `python tests/support/recompute.py runs/my_sweep` prints every cell.
"""

from __future__ import annotations

import json
import math
import struct
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Seeds = dict[int, float]
"""A number by seed."""
STEPS = 2000
"""Of Simpson's rule."""


def rows_of(folder: Path) -> dict[str, dict[int, Path]]:
    """Run folders of a sweep by row and seed; a row is named by its label and grid values."""
    plan = json.loads((folder / "sweep.json").read_text())
    rows: dict[str, dict[int, Path]] = {}
    for run in plan["runs"]:
        values = [f"{key.split('.')[-1]} {value}" for key, value in run["values"].items()]
        label = ", ".join([run["row"], *values])
        rows.setdefault(label, {})[run["seed"]] = folder / run["name"]
    return rows


def rounds_of(run: Path) -> list[dict[str, Any]]:
    """The lines of the federation's rounds."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "round"]


def tested(line: Mapping[str, Any], part: str) -> list[float]:
    """Accuracies of the clients with test images."""
    return [a for a in line[part]["accuracy"] if a is not None]


def numbers(run: Path) -> dict[str, float]:
    """One run's columns: accuracies of the last round, shared numbers, bytes of all rounds."""
    lines = rounds_of(run)
    own = tested(lines[-1], "personal")
    return {
        "global": lines[-1]["global"]["accuracy"],
        "personal": sum(own) / len(own),
        "worst": min(own),
        "p10": quantile(own, 0.1),
        "personal_on_global": mean(tested(lines[-1], "personal_on_global")),
        "numbers_up": float(shared_numbers(run)),
        "bytes": float(sum(line["bytes_up"] + line["bytes_down"] for line in lines)),
    }


def shared_numbers(run: Path) -> int:
    """Numbers in the shared tensors, from the head of the safetensors file."""
    content = (run / "prompts.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    head = json.loads(content[8 : 8 + size])
    return sum(math.prod(v["shape"]) for name, v in head.items() if name.startswith("shared/"))


def table(folder: Path) -> dict[str, dict[str, Seeds]]:
    """Every row's columns by seed."""
    found: dict[str, dict[str, Seeds]] = {}
    for row, runs in rows_of(folder).items():
        for seed, run in runs.items():
            for name, value in numbers(run).items():
                found.setdefault(row, {}).setdefault(name, {})[seed] = value
    return found


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def deviation(values: Sequence[float]) -> float:
    """Of a sample: divided by n - 1."""
    middle = mean(values)
    return math.sqrt(math.fsum((v - middle) ** 2 for v in values) / (len(values) - 1))


def quantile(values: Sequence[float], share: float) -> float:
    """Linear between the two nearest ranks."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def paired_p(a: Seeds, b: Seeds) -> float:
    """Two-sided p of a paired t-test over common seeds.

    With t = sqrt(df) tan(x), P(|T| < t) is the integral of cos^(df - 1) up to x over that up to
    pi / 2.
    """
    differences = [a[s] - b[s] for s in sorted(a.keys() & b.keys())]
    n = len(differences)
    t = abs(mean(differences)) / (deviation(differences) / math.sqrt(n))
    edge = math.atan(t / math.sqrt(n - 1))
    return 1 - _area(edge, n - 2) / _area(math.pi / 2, n - 2)


def _area(edge: float, power: int) -> float:
    """The integral of cos^power from 0 to `edge`."""
    step = edge / STEPS
    weights = [1, *([4, 2] * (STEPS // 2))[:-1], 1]
    return step / 3 * math.fsum(w * math.cos(i * step) ** power for i, w in enumerate(weights))


def conditions(folder: Path) -> dict[str, list[str]]:
    """The names of the rows that share their values of the grid, by these values."""
    plan = json.loads((folder / "sweep.json").read_text())
    found: dict[str, list[str]] = {}
    names = list(rows_of(folder))
    for name, run in {
        ", ".join([run["row"], *(f"{k.split('.')[-1]} {v}" for k, v in run["values"].items())]): run
        for run in plan["runs"]
    }.items():
        assert name in names
        found.setdefault(json.dumps(run["values"]), []).append(name)
    return found


def columns(folder: Path, by_row: Mapping[str, Seeds]) -> tuple[set[str], dict[str, float]]:
    """The best rows of all conditions, and the p of the others, each corrected on its own."""
    best, p = set(), {}
    for rows in conditions(folder).values():
        winner, corrected = column({row: by_row[row] for row in rows})
        best.add(winner)
        p |= corrected
    return best, p


def column(by_row: Mapping[str, Seeds]) -> tuple[str, dict[str, float]]:
    """The row with the highest mean, and the Holm-corrected p of all others against it."""
    best = max(by_row, key=lambda row: mean(list(by_row[row].values())))
    raw = {row: paired_p(by_row[best], by_row[row]) for row in by_row if row != best}
    corrected: dict[str, float] = {}
    highest = 0.0
    for i, row in enumerate(sorted(raw, key=lambda row: raw[row])):
        highest = max(highest, min(1.0, (len(raw) - i) * raw[row]))
        corrected[row] = highest
    return best, corrected


def curve(runs: Mapping[int, Path], part: str, key: str) -> dict[int, tuple[float, float, float]]:
    """By round that all seeds have tested: bytes sent until then, mean, deviation."""
    sent: dict[int, list[float]] = {}
    values: dict[int, list[float]] = {}
    for run in runs.values():
        total = 0.0
        for line in rounds_of(run):
            total += line["bytes_up"] + line["bytes_down"]
            if line.get(part):
                sent.setdefault(line["round"], []).append(total)
                values.setdefault(line["round"], []).append(line[part][key])
    return {
        r: (mean(sent[r]), mean(found), deviation(found))
        for r, found in values.items()
        if len(found) == len(runs)
    }


def main(folder: Path) -> None:
    found = table(folder)
    for name in next(iter(found.values())):
        for row, columns in found.items():
            values = list(columns[name].values())
            print(f"{name}\t{row}\t{mean(values):.6g}\t{deviation(values):.6g}\t{len(values)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
