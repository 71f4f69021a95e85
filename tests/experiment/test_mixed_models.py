"""Other image towers beside one text tower: allowed by a method's declaration, or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fedprompt.workspace.experiment as module
from fedprompt.backbone.tiny import tiny_model_config, tiny_state_dict
from fedprompt.config.schema import Config
from fedprompt.errors import UserError
from fedprompt.experiment.architectures import refuse_architecture
from fedprompt.experiment.display import QuietDisplay
from fedprompt.experiment.run import run
from fedprompt.experiment.workspaces import open_workspace
from fedprompt.methods.method_config import allows_other_image_towers
from fedprompt.methods.registry import all_methods
from fedprompt.reports.run_data import read_object
from tests.support.builders import random_clip, small_config
from tests.support.protocol_runs import silent

MIXED: dict[str, Any] = {
    "backbone": {"client_models": ["own", "other"]},
    "method": {"name": "promptfl", "context_tokens": 2},
    "data": {"images_per_class": 4, "domains": ["delta"]},
    "partition": {"clients": 2, "alpha": 10.0, "local_test_fraction": 0.3},
    "federation": {"rounds": 1},
}


@pytest.fixture
def other_model(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """A model `other` with an image tower of its own, and the embedded text tower or another."""
    load = module.load_clip

    def use(same_text: bool) -> None:
        def opened(config: Any, cache: Path) -> Any:
            if config.model != "other":
                return load(config, cache)
            clip = random_clip(**{**tiny_model_config(), "vision_cfg": VISION})
            if same_text:
                texts = {n: t for n, t in tiny_state_dict().items() if "visual." not in n}
                clip.model.load_state_dict(texts, strict=False)
            return clip

        names = {"own": {"model": "tiny"}, "other": {"model": "other", "checkpoint": "a file"}}
        monkeypatch.setattr(module, "load_clip", opened)
        monkeypatch.setattr(module, "resolve_group", lambda group, name: names[name])

    return use


VISION = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 32}


def test_a_run_with_two_image_towers(
    other_model: Callable[[bool], None], run_config: Callable[..., Config]
) -> None:
    other_model(True)
    path = run(run_config(**MIXED), QuietDisplay(silent()))
    found = read_object(path / "summary.json")["by_backbone"]
    assert {kind: part["clients"] for kind, part in found.items()} == {"own": [0], "other": [1]}
    assert found["own"]["global"] > found["other"]["global"]


def test_clients_have_their_own_features_and_one_text_tower(
    other_model: Callable[[bool], None],
) -> None:
    other_model(True)
    workspace = open_workspace(small_config(**MIXED))
    own, other = workspace.of_client(0), workspace.of_client(1)
    assert own is workspace
    assert other.clip.fingerprint != own.clip.fingerprint
    shared = own.method.init_shared(1)
    classes = [
        w.method.encode({n: t[None] for n, t in shared.items()}, {})["classes"]
        for w in (own, other)
    ]
    torch.testing.assert_close(*classes)
    assert other.test_data(0)[0].features.shape == own.test_data(0)[0].features.shape


def test_another_text_tower_is_refused(other_model: Callable[[bool], None]) -> None:
    other_model(False)
    with pytest.raises(UserError, match="another text tower"):
        open_workspace(small_config(**MIXED))


def test_the_methods_that_allow_it() -> None:
    allowed = {n for n, cls in all_methods().items() if allows_other_image_towers(cls.Config())}
    assert allowed == {
        "promptfl", "coop_csc", "kgcoop", "fedkgcoop", "prograd", "fedprox", "ditto", "fedper"
    }  # fmt: skip
    # A wrapper has its base's answer.
    assert not allows_other_image_towers(all_methods()["fedprox"].Config(base="maple"))
    # Not inherited: this one adapts visual features, with PromptFL's keys.
    assert not allows_other_image_towers(all_methods()["pfedprompt"].Config())


@pytest.mark.parametrize("method", [{"name": "maple"}, {"name": "fedprox", "base": "vpt"}])
def test_other_methods_refuse_it(method: dict[str, Any]) -> None:
    config = small_config(**{**MIXED, "method": method})
    with pytest.raises(UserError, match=r"client_models.*" + method["name"]):
        refuse_architecture(config)
