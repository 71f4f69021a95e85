"""Short runs with evaluation protocols, and their models' logits computed the slow way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from fedprompt.config.schema import Config
from fedprompt.data.features.inputs import Inputs
from fedprompt.evaluation.registry import (
    DEFAULT,
    all_protocols,
)
from fedprompt.experiment.checkpoint import read_checkpoint
from fedprompt.experiment.compose import compose
from fedprompt.experiment.workspaces import open_workspace
from fedprompt.methods.base import Task
from fedprompt.methods.registry import method_class
from fedprompt.reports.run_data import PRIVATE
from fedprompt.simulation.private_log import PrivateLog
from fedprompt.workspace import Workspace
from tests.support.builders import small_config

TARGETS = [
    {"use": "aerial_scenes", "title": "steppe", "domains": ["steppe"], "images_per_class": 2},
    {"use": "aerial_scenes", "title": "oasis", "domains": ["oasis"], "images_per_class": 4,
     "class_names": ["beach", "runway", "sea ice"]},
]  # fmt: skip
WITH_RESULTS = [name for name in all_protocols() if name not in DEFAULT]
OPTIONS: dict[str, Any] = {
    "base_to_new": {"all_classes": True},
    "cross_data_set": {"targets": TARGETS},
    "ood": {"local": True},
    "leave_one_domain_out": {"domain": "highland"},
    "corruptions": {
        "kinds": ["jpeg_compression", "contrast"],
        "severities": [1, 5],
        "images": 10,
        "client_images": 2,
    },
    "compression": {"formats": ["fp16"], "pruned": []},
    "robustness": {"eps": [4.0], "steps": 2, "images": 12, "client_images": 2},
    "at_test_time": {"images": 12, "client_images": 4, "batch_size": 4},
    "privacy_audit": {"candidates": 16, "images": 2},
    "unlearning": {"shadows": 0, "subsets": 2},
    "late_joiners": {"steps": [0, 2]},
}
NEEDS: dict[str, dict[str, Any]] = {
    "class_incremental": {"partition": {"sessions": 2}},
    "late_joiners": {"partition": {"late_clients": 1}},
    "time_to_accuracy": {"clock": {"enabled": True}},
}
"""Sections without which a protocol refuses a run."""
TOGETHER = [n for n in WITH_RESULTS if n not in ("leave_one_domain_out", "class_incremental")]
"""Protocols that one run can have."""


def config_of(*names: str, **sections: Any) -> Config:
    """A small experiment with these protocols beside the default ones."""
    options = {n: OPTIONS[n] for n in names if n in OPTIONS}
    needed = {key: section for n in names for key, section in NEEDS.get(n, {}).items()}
    return small_config(
        **{
            "data": {"images_per_class": 8, "domains": ["savanna", "highland", "delta"]},
            "federation": {"rounds": 2},
            "protocols": [*DEFAULT, *names],
            "protocol_options": options,
            **needed,
            **sections,
        }
    )


def silent() -> Any:
    """A console that prints nothing."""
    from rich.console import Console

    return Console(quiet=True)


def summary_of(folder: Path) -> dict[str, Any]:
    """A run's summary."""
    loaded: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return loaded


def models_of(folder: Path) -> tuple[Workspace, dict[str, torch.Tensor], list[Any]]:
    """The run's workspace, shared tensors and each client's private ones."""
    config = compose(folder / "config.yaml")
    workspace = open_workspace(config)
    checkpoint = read_checkpoint(folder / "checkpoint.safetensors")
    log = PrivateLog(folder / PRIVATE, workspace.num_clients)
    log.read(checkpoint.server_round, checkpoint.private)
    private = [log.get(k) or workspace.start_private(k) for k in range(workspace.num_clients)]
    return workspace, checkpoint.shared, private


def logits(
    workspace: Workspace,
    names: tuple[str, ...],
    shared: dict[str, torch.Tensor],
    own: dict[str, torch.Tensor] | None,
    index: Any,
) -> torch.Tensor:
    """One model on some images, encoded from the pixels for one class list."""
    cls = method_class(workspace.config.method.name)
    method = cls(workspace.config.method, workspace.clip, Task(names, workspace.task.templates))
    images = [workspace.clip.preprocess(workspace.dataset.open_image(int(i))) for i in index]
    features = F.normalize(workspace.clip.encode_images(torch.stack(images)), dim=-1)
    private = None if own is None else {n: t[None] for n, t in own.items()}
    with torch.no_grad():
        encoded = method.encode({n: t[None] for n, t in shared.items()}, private)
        return method.logits(encoded, Inputs(features[None]))[0]
