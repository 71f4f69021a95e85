"""The result file: what one row of a suite reached, in one small JSON file.

Result files are passed around and merged by `fedprompt leaderboard`, so a reader trusts none of
them: the checksum tells edited files, and every value is checked. The checksum is over the content
and no signature; whoever wants to cheat can compute it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fedprompt.errors import DamagedFile, UserError
from fedprompt.files import refuse_foreign, write_bytes
from fedprompt.suites.checked_json import Limits, Pattern, build, plain

SCHEMA = 1
"""The number of this schema. It grows when a field is added, removed or changes its meaning."""
RESULTS = "results"
"""The folder of the result files in the folder of a suite."""
SETTINGS = ("tuned", "default")
"""With which settings a row is measured: those of the search, and those of its paper."""
LARGEST_FILE = 16 * 1024**2
"""Bytes. A file of five scenarios and three seeds has about 15 KiB."""
MARK = b'"suite_hash"'
"""What our files contain near their beginning."""


class NotOurs(UserError):
    """A file that is something else than a result file."""


Sha256 = Annotated[str, Pattern("[0-9a-f]{64}", "64 hexadecimal digits")]
Name = Annotated[str, Pattern(r"\S(.*\S)?", "a name")]
SuiteName = Annotated[
    str, Pattern(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", "letters, digits, dots, hyphens")
]
"""Part of the names of files."""
Accuracy = Annotated[float, Limits(0, 1)]
Count = Annotated[int, Limits(0)]
Amount = Annotated[float, Limits(0)]


@dataclass(frozen=True, kw_only=True)
class SeedResult:
    """The numbers of one run. Accuracies are fractions; None stands for what was not measured.

    Attributes:
        value: The metric of the scenario, in the reported round.
        last: The same metric in the last round.
        global_: Accuracy on the server's test images.
        personal: Mean over clients of the accuracy on their own test images.
        worst: The lowest of these.
        bytes_up: Bytes that the clients sent, all rounds together.
        bytes_down: Bytes that the server sent.
        client_steps: Optimiser steps, all clients and rounds together.
        seconds: Wall time of the run.
        peak_memory_bytes: The largest resident set size of the run's processes.
        diverged: What diverged, in one line; None if nothing did.
    """

    value: Accuracy
    last: Accuracy | None
    global_: Accuracy | None
    personal: Accuracy | None
    worst: Accuracy | None
    bytes_up: Count
    bytes_down: Count
    client_steps: Count
    seconds: Amount
    peak_memory_bytes: Count | None
    diverged: str | None


@dataclass(frozen=True, kw_only=True)
class SettingResult:
    """A row in one scenario with one setting.

    Attributes:
        settings: The values that the search chose, by config key; empty for the paper's settings.
        config_hash: SHA-256 of the resolved config without its seed and `output`.
        trials: Trials of the search that chose the settings; 0 without a search.
        seeds: The results by seed.
    """

    settings: Mapping[str, Any]
    config_hash: Sha256
    trials: Count
    seeds: Mapping[int, SeedResult]


@dataclass(frozen=True, kw_only=True)
class ScenarioResult:
    """A row in one scenario.

    Attributes:
        metric: The metric by which the scenario compares.
        data: Fingerprint of the data set.
        partitions: Fingerprints of the partitions by seed: which images each client has, per part.
        tuned: The results with the settings of the search; None if it was not run.
        default: The results with the settings of the paper; None if it was not run.
    """

    metric: Name
    data: Name
    partitions: Mapping[int, Sha256]
    tuned: SettingResult | None = None
    default: SettingResult | None = None


@dataclass(frozen=True, kw_only=True)
class ResultFile:
    """What one row of a suite reached.

    Attributes:
        suite: Name and version of the suite, e.g. `scenes-v1`.
        suite_hash: SHA-256 of the suite's resolved content.
        planned: What the suite asks for: its seeds, by scenario. A row is complete when it has all.
        method: The method.
        row: The name of the row, which is unique in the suite.
        versions: Versions of what computed the results, by package.
        machine: What it was computed on, e.g. `cpu` and `device`.
        search: The search that chose the tuned settings, in words; empty without a search.
        scenarios: The results by scenario.
    """

    suite: SuiteName
    suite_hash: Sha256
    planned: Mapping[str, tuple[Count, ...]]
    method: Name
    row: Name
    versions: Mapping[str, str]
    machine: Mapping[str, str]
    search: str
    scenarios: Mapping[str, ScenarioResult]


def write(result: ResultFile, path: Path) -> None:
    """Write a result file atomically, after the checks of `read`.

    Args:
        result: what to write.
        path: the file, which may be an earlier result file; its folder is created if necessary.

    Raises:
        UserError: a value is one that `read` refuses, the path is a file that is not ours, or it
            cannot be written.
    """
    content = {"schema": SCHEMA, **plain(result)}
    try:
        # This also refuses NaN, and settings that JSON cannot express.
        content = json.loads(json.dumps(content, allow_nan=False))
        _checked(content)
    except (UserError, TypeError, ValueError) as error:
        raise UserError(f"suite: cannot write {path}: {error}") from None
    refuse_foreign(path, MARK)
    content["checksum"] = checksum(content)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, f"{json.dumps(content, indent=1)}\n".encode())
    except OSError as error:
        raise UserError(f"suite: cannot write {path}: {error.strerror}.") from None


def read(path: Path) -> ResultFile:
    """Read a result file and check all of it.

    Args:
        path: the file.

    Raises:
        DamagedFile: the file is not whole, or it was edited.
        NotOurs: it is no result file.
        UserError: it has another schema, or one of its values is impossible.
            Every message names the file, and the field if one is wrong.
    """
    content = _load(path)
    schema = content.get("schema")
    if not isinstance(schema, int) or "suite_hash" not in content:
        raise NotOurs(f"{path} is not a result file of a suite.")
    if schema != SCHEMA:
        advice = "update fedprompt" if schema > SCHEMA else "write it anew with 'fedprompt suite'"
        raise UserError(
            f"{path}: schema is {schema}, and this version of fedprompt reads {SCHEMA}; {advice}."
        )
    stored = content.pop("checksum", None)
    if stored != checksum(content):
        raise DamagedFile(
            f"{path}: checksum is not that of the content: the file was edited or is damaged; "
            "restore it, or write it anew with 'fedprompt suite'."
        )
    try:
        return _checked(content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def checksum(content: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON object without its `checksum`, whatever its layout and order in a file."""
    kept = {key: value for key, value in content.items() if key != "checksum"}
    return hashlib.sha256(
        json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def _load(path: Path) -> dict[str, Any]:
    """The JSON object in a file, in which no key stands twice and every number is finite."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key stands twice")
        return found

    def finite(number: str) -> float:
        # Python reads NaN and Infinity, and 1e999 as infinity.
        if not math.isfinite(float(number)):
            raise ValueError(f"{number} is not a finite number")
        return float(number)

    try:
        # A folder may hold any files that end in .json, such as the annotations of a data set.
        if path.stat().st_size > LARGEST_FILE:
            raise UserError(f"{path} is too large for a result file.")
        # A pipe would block.
        if not path.is_file():
            raise UserError(f"{path} is not a file.")
        text = path.read_bytes()
        content = json.loads(
            text, object_pairs_hook=unique, parse_float=finite, parse_constant=finite
        )
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise DamagedFile(f"{path} is not a whole JSON file: {reason}.") from None
    if not isinstance(content, dict):
        raise NotOurs(f"{path} is not a result file of a suite.")
    return content


def _checked(content: Mapping[str, Any]) -> ResultFile:
    """Build a result from JSON and check what single values do not tell.

    Raises:
        UserError: a value is impossible; the message names its field.
    """
    result = build(ResultFile, {k: v for k, v in content.items() if k != "schema"})
    if not result.planned:
        raise UserError("planned is empty; a suite has at least one scenario.")
    for name, seeds in result.planned.items():
        if not seeds or len(set(seeds)) < len(seeds):
            raise UserError(f"planned.{name} must list at least one seed, and each once.")
    for name, scenario in result.scenarios.items():
        where = f"scenarios.{name}"
        if name not in result.planned:
            raise UserError(f"{where} is not in 'planned'.")
        for setting in SETTINGS:
            found: SettingResult | None = getattr(scenario, setting)
            for seed in found.seeds if found else ():
                if seed not in result.planned[name]:
                    raise UserError(f"{where}.{setting}.seeds.{seed} is not in 'planned'.")
                if seed not in scenario.partitions:
                    raise UserError(f"{where}.partitions.{seed} is missing.")
    return result
