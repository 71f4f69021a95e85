"""A method and an architecture that do not fit are refused before weights are looked for."""

from __future__ import annotations

from typing import Any

import pytest

from fedprompt.errors import UserError
from fedprompt.experiment.architectures import refuse_architecture
from fedprompt.experiment.workspaces import open_workspace
from tests.support.builders import small_config


@pytest.mark.parametrize(
    ("model", "method", "word"),
    [
        ("RN50", {"name": "vpt"}, "image tower"),
        ("RN50", {"name": "fedrsclip", "visual": "shared"}, "image tower"),
        ("RN50", {"name": "fedprox", "base": "vpt"}, "image tower"),
        ("coca_ViT-B-32", {"name": "plot"}, "patches"),
    ],
)
def test_refused_before_weights(model: str, method: dict[str, Any], word: str) -> None:
    backbone = {"model": model, "checkpoint": "no such file"}
    with pytest.raises(UserError) as caught:
        open_workspace(small_config(backbone=backbone, method=method))
    line = str(caught.value)
    assert line.startswith("backbone: ")
    assert word in line
    assert model in line
    assert method["name"] in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("model", "method"),
    [
        ("RN50", "promptfl"),
        ("RN50", "plot"),
        ("RN50", "fedrsclip"),
        ("ViT-B-16", "vpt"),
        ("tiny", "vpt"),
        ("local-dir:/no/such/folder", "vpt"),
    ],
)
def test_what_fits_passes(model: str, method: str) -> None:
    backbone: dict[str, Any] = {"model": model}
    if not model.startswith(("tiny", "local")):
        backbone["checkpoint"] = "no such file"
    refuse_architecture(small_config(backbone=backbone, method={"name": method}))
