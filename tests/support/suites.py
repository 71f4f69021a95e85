"""A suite that runs in a second: one domain, two clients, one round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from fedprompt.suites.load import load_suite
from fedprompt.suites.spec import Suite

CONTENT: dict[str, Any] = {
    "title": "a small one",
    "seeds": [1],
    "common": [
        "data.images_per_class=8", "data.domains=[savanna]", "partition.clients=2",
        "partition.local_validation_fraction=0.3", "federation.rounds=1",
        "simulation.threads=1", "training.batch_size=8", "output.report=false",
    ],
    "rows": {"Zero-shot CLIP": ["method=zero_shot"], "PromptFL": ["method=promptfl"]},
    "search": {"trials": 2, "batch": 2, "sampler": "random", "with": ["data.first_image=8"]},
    "scenarios": {
        "skew": {"experiment": "benchmark", "overrides": ["partition.alpha=1"]},
        "alike": {
            "experiment": "benchmark",
            "overrides": ["partition.scheme=iid"],
            "settings_of": "skew",
        },
    },
    "quick": {"common": ["data.images_per_class=4"], "rows": ["PromptFL"], "scenarios": ["skew"]},
}  # fmt: skip


def write(folder: Path, name: str = "small-v1", **changes: Any) -> Path:
    """Write `CONTENT` with some keys changed; None leaves a key out."""
    path = folder / f"{name}.yaml"
    content = {key: value for key, value in {**CONTENT, **changes}.items() if value is not None}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def load(folder: Path, **changes: Any) -> Suite:
    """`CONTENT` with some keys changed, as a suite."""
    return load_suite(write(folder, **changes))


def scenario(name: str, **changes: Any) -> dict[str, Any]:
    """The scenarios of `CONTENT` with some keys of one changed."""
    parts: dict[str, Any] = CONTENT["scenarios"]
    return {**parts, name: {**parts[name], **changes}}
