"""Made-up result files of a suite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedprompt.suites.result_file import ResultFile, ScenarioResult, SeedResult, SettingResult

DIGEST = "0123456789abcdef" * 4


def seed_result(value: float, **changes: Any) -> SeedResult:
    """One run's numbers: everything but the accuracy is the same in all runs."""
    result = SeedResult(
        value=value, last=value, global_=value / 2, personal=value, worst=value / 4,
        bytes_up=2048, bytes_down=4096, client_steps=100, seconds=1.5,
        peak_memory_bytes=10**9, diverged=None,
    )  # fmt: skip
    return replace(result, **changes)


def setting_result(values: Mapping[int, float], *, tuned: bool = False) -> SettingResult:
    """The results of one setting from accuracies by seed."""
    return SettingResult(
        settings={"training.lr": 0.03} if tuned else {},
        config_hash=DIGEST,
        trials=12 if tuned else 0,
        seeds={seed: seed_result(value) for seed, value in values.items()},
    )


def result_file(
    row: str,
    default: Mapping[str, Mapping[int, float]],
    tuned: Mapping[str, Mapping[int, float]] | None = None,
    *,
    planned: Mapping[str, Sequence[int]] | None = None,
    **changes: Any,
) -> ResultFile:
    """A row of the suite `demo-v1` from accuracies by scenario and seed.

    Args:
        row: its name.
        default: accuracies with the settings of the paper.
        tuned: accuracies with those of the search, in the same scenarios; None without a search.
        planned: the seeds of the suite by scenario; those of `default` unless given.
        changes: other fields of the file.
    """
    planned = planned or {name: tuple(values) for name, values in default.items()}
    result = ResultFile(
        suite="demo-v1",
        suite_hash=DIGEST,
        planned={name: tuple(seeds) for name, seeds in planned.items()},
        method=row.lower(),
        row=row,
        versions={"fedprompt": "0.1.0", "torch": "2.9.0"},
        machine={"cpu": "one", "device": "cpu"},
        search="12 trials by tpe" if tuned else "",
        scenarios={
            name: ScenarioResult(
                metric="personal",
                data="made-up",
                partitions=dict.fromkeys(planned[name], DIGEST),
                default=setting_result(values),
                tuned=setting_result(tuned[name], tuned=True) if tuned else None,
            )
            for name, values in default.items()
        },
    )
    return replace(result, **changes)
