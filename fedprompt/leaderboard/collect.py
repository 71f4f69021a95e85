"""Finds result files, and keeps those of each suite that can be compared with each other.

No file is trusted more than another. Where files of a suite disagree on its content, its data or
its partitions, the version of most files counts, or of the first one if equally many have each;
all others are refused. Two files with different numbers for the same row are both refused, because
nothing tells which one is right, and a ranking must not depend on the order of the files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedprompt.errors import UserError
from fedprompt.reports.format import plural
from fedprompt.suites.result_file import RESULTS, SETTINGS, NotOurs, ResultFile, read

SHOWN = 12
"""Characters of a hash or fingerprint that a message shows."""


@dataclass(frozen=True)
class Entry:
    """A row of a suite.

    Attributes:
        path: Its result file.
        result: The content of the file.
        copies: Other files with the same numbers, or with a part of them.
    """

    path: Path
    result: ResultFile
    copies: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Refused:
    """A file that is left out, and why; the reason names the file."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Suite:
    """The comparable result files of a suite, at least one.

    Attributes:
        name: Name and version.
        digest: The hash of its content.
        planned: Its seeds by scenario.
        metrics: Its metrics by scenario, as far as a file has the scenario.
        entries: One per row, in the order of the files.
    """

    name: str
    digest: str
    planned: Mapping[str, tuple[int, ...]]
    metrics: Mapping[str, str]
    entries: tuple[Entry, ...]


def collect(paths: Sequence[Path]) -> tuple[list[Suite], list[Refused]]:
    """Read result files and group them by suite.

    Args:
        paths: Result files, and folders. A folder stands for the result files directly in it and
            for those in all folders `results` at any depth below it.

    Returns:
        The suites in the order of their first files, and the files that were refused.

    Raises:
        UserError: A path does not exist, or a folder contains no result file.
    """
    results: dict[Path, ResultFile] = {}
    refused: list[Refused] = []
    # A file may be given twice, for example by itself and with its folder.
    seen: set[Path] = set()
    for path in paths:
        any_here = False
        for file in _files(path):
            is_new = file.resolve() not in seen
            seen.add(file.resolve())
            try:
                result = read(file)
                if is_new:
                    results[file] = result
            except NotOurs as error:
                # A folder may hold any other JSON files.
                if file != path:
                    continue
                refused.append(Refused(file, str(error)))
            except UserError as error:
                refused += [Refused(file, str(error))] if is_new else []
            any_here = True
        if not any_here:
            raise UserError(f"leaderboard: there is no result file in {path}.")
    names = dict.fromkeys(result.suite for result in results.values())
    suites = []
    for name in names:
        of_suite = {path: one for path, one in results.items() if one.suite == name}
        of_suite, unlike = _comparable(of_suite)
        entries, contradicting = _rows(of_suite)
        refused += [*unlike, *contradicting]
        if entries:
            first = entries[0].result
            metrics = {n: s.metric for e in entries for n, s in e.result.scenarios.items()}
            suites.append(Suite(name, first.suite_hash, first.planned, metrics, tuple(entries)))
    return suites, refused


def _files(path: Path) -> Iterator[Path]:
    if not path.exists():
        raise UserError(f"leaderboard: there is no file or folder {path}.")
    if not path.is_dir():
        yield path
        return
    yield from sorted(path.glob("*.json"))
    for folder in sorted(p for p in path.rglob(RESULTS) if p.is_dir()):
        yield from sorted(folder.glob("*.json"))


def _comparable(
    results: Mapping[Path, ResultFile],
) -> tuple[dict[Path, ResultFile], list[Refused]]:
    """Keep the files that agree with most others on what was measured."""
    refused: list[Refused] = []
    kept = dict(results)
    # The content of the suite comes first: of files of another suite, nothing else is comparable.
    for keys in (_suite_content, _scenario_content):
        votes: dict[str, Counter[str]] = {}
        for result in kept.values():
            for key, value in keys(result).items():
                votes.setdefault(key, Counter())[value] += 1
        # `most_common` keeps the order of the first files among equals.
        usual = {key: counter.most_common(1)[0] for key, counter in votes.items()}
        for path, result in list(kept.items()):
            for key, value in keys(result).items():
                common, times = usual[key]
                if value != common:
                    refused.append(
                        Refused(
                            path,
                            f"{path}: {key} is {value[:SHOWN]}, and {common[:SHOWN]} in "
                            f"{plural(times, 'other file')} of {result.suite}; their numbers "
                            "cannot be compared.",
                        )
                    )
                    del kept[path]
                    break
    return kept, refused


def _suite_content(result: ResultFile) -> dict[str, str]:
    planned = {f"planned.{name}": str(list(seeds)) for name, seeds in result.planned.items()}
    return {"suite_hash": result.suite_hash, "planned": ", ".join(result.planned), **planned}


def _scenario_content(result: ResultFile) -> dict[str, str]:
    """Everything about the scenarios that all rows share, by the names of the fields."""
    found: dict[str, str] = {}
    for name, scenario in result.scenarios.items():
        where = f"scenarios.{name}"
        found |= {f"{where}.data": scenario.data, f"{where}.metric": scenario.metric}
        for seed, partition in scenario.partitions.items():
            found[f"{where}.partitions.{seed}"] = partition
    return found


def _rows(results: Mapping[Path, ResultFile]) -> tuple[list[Entry], list[Refused]]:
    """One entry per row; files that contradict each other are refused."""
    rows: dict[str, list[Path]] = {}
    for path, result in results.items():
        rows.setdefault(result.row, []).append(path)
    entries, refused = [], []
    for row, paths in rows.items():
        numbers = {path: _numbers(results[path]) for path in paths}
        # The largest of the files: an earlier copy of a folder may lack the latest runs.
        main = max(paths, key=lambda path: len(numbers[path]))
        others = [path for path in paths if path != main]
        wrong = {path: _contradiction(numbers[path], numbers[main]) for path in others}
        if any(wrong.values()):
            reason = next(field for field in wrong.values() if field)
            names = ", ".join(map(str, paths))
            refused += [
                Refused(
                    path,
                    f"{path}: row '{row}' has several results: {reason} differs between {names}; "
                    "leave one of them.",
                )
                for path in paths
            ]
        else:
            entries.append(Entry(main, results[main], tuple(others)))
    return entries, refused


def _numbers(result: ResultFile) -> dict[str, object]:
    """What two computations of a row agree on: not time, memory and hashes of paths in configs."""
    found: dict[str, object] = {"method": result.method}
    for name, scenario in result.scenarios.items():
        for setting in SETTINGS:
            measured = getattr(scenario, setting)
            if measured is None:
                continue
            where = f"scenarios.{name}.{setting}"
            for seed, run in measured.seeds.items():
                found[f"{where}.seeds.{seed}"] = (
                    run.value, run.last, run.global_, run.personal, run.worst,
                    run.bytes_up, run.bytes_down, run.client_steps, run.diverged,
                )  # fmt: skip
    return found


def _contradiction(part: Mapping[str, object], whole: Mapping[str, object]) -> str:
    """The first field of `part` that `whole` lacks or has otherwise; empty if there is none."""
    return next((key for key, value in part.items() if key not in whole or whole[key] != value), "")
