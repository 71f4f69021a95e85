"""Accuracy under corruptions by a second way, and its options."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fedprompt.data.cache_files import digest
from fedprompt.data.corruptions import corrupted
from fedprompt.errors import UserError
from fedprompt.evaluation.protocols.corruptions import CorruptionOptions
from fedprompt.evaluation.registry import result_tables
from fedprompt.methods.base import stack
from fedprompt.rng import generator
from tests.support.protocol_runs import models_of, summary_of


def test_accuracy_under_corruptions_by_a_second_way(runs: Callable[..., Path]) -> None:
    folder = runs("corruptions")
    part = summary_of(folder)["protocols"]["corruptions"]
    workspace, shared, _ = models_of(folder)
    clip, dataset = workspace.clip, workspace.dataset
    (row,) = [row for row in part["rows"] if row["model"] == "global"]
    test = workspace.partition.server_test
    index = test[np.linspace(0, len(test) - 1, 10).round().astype(int)]
    assert row["images"] == 10
    mean, std = clip.mean_std[:, :, None, None]
    pixels = []
    for i in index:
        image = clip.preprocess(dataset.open_image(int(i))) * std + mean
        image_HW3 = (image * 255).round().byte().permute(1, 2, 0).numpy()
        # Drawn images have no keys of their own.
        content = digest(dataset.fingerprint, str(i))
        draw = generator(workspace.config.seed, "corruption", "contrast", content)
        found = corrupted(image_HW3, "contrast", 5, draw)
        pixels.append((torch.from_numpy(found).permute(2, 0, 1) / 255 - mean) / std)
    features = torch.nn.functional.normalize(clip.encode_images(torch.stack(pixels)), dim=-1)
    with torch.no_grad():
        classes = workspace.method.encode(stack([shared]), None)["classes"][0]
    right = (features @ classes.T).argmax(-1).numpy() == dataset.labels_N[index]
    assert row["accuracy"]["contrast"][1] == pytest.approx(right.mean())
    every = [value for found in row["accuracy"].values() for value in found]
    assert row["mean"] == pytest.approx(np.mean(every))
    assert row["by_severity"][0] == pytest.approx(np.mean(every[::2]))


def test_personal_models_are_tested_on_their_clients(runs: Callable[..., Path]) -> None:
    folder = runs("corruptions", method={"name": "coop_local"})
    rows = summary_of(folder)["protocols"]["corruptions"]["rows"]
    assert [row["model"] for row in rows] == ["zero-shot", "personal"]
    assert set(rows[1]["accuracy"]) == {"contrast", "jpeg_compression"}
    (table,) = result_tables(summary_of(folder), "here")
    assert [name for name, *_ in table.rows[:2]] == [
        "zero-shot, mean of 2", "personal, mean of 2",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"kinds": ["fog", "smog"]}, "smog"),
        ({"kinds": ["fog", "fog"]}, "kinds"),
        ({"severities": []}, "severities"),
        ({"severities": [1, 6]}, "severities"),
    ],
)
def test_bad_options(options: dict[str, list[str | int]], named: str) -> None:
    with pytest.raises(UserError, match=named):
        CorruptionOptions(**options).check()  # type: ignore[arg-type]
