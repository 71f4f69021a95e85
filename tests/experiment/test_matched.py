"""The baseline is matched to the method, and unsuitable choices are said."""

from __future__ import annotations

from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from fedprompt.config.schema import Config
from fedprompt.experiment import run as experiments
from fedprompt.experiment.display import QuietDisplay
from fedprompt.experiment.trackers import Loggers
from fedprompt.experiment.validate import unsuited_backbone
from fedprompt.reports.run_data import context_tokens
from tests.support.builders import small_config


def baseline(config: Config, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any, dict[str, Any]]:
    """The method and training that local-only training gets, and what the summary says of it."""
    built: list[Any] = []

    def with_method(*sections: Any) -> Any:
        built.append(sections)
        return SimpleNamespace(config=config, trainable=(0,))

    monkeypatch.setattr(experiments, "Federation", lambda *_: None)
    monkeypatch.setattr(experiments, "run_reference", lambda *_: {"round": 3})
    workspace = cast("Any", SimpleNamespace(config=config, with_method=with_method))
    grid = cast("Any", SimpleNamespace(use=lambda _: None))
    loggers = cast("Loggers", None)
    line = experiments._local_only(workspace, grid, cast("Any", None), QuietDisplay(), loggers)
    assert line is not None
    return *built[0], line


@pytest.mark.parametrize(
    ("sections", "tokens"),
    [
        ({"method": {"name": "fedrsclip"}}, 4),
        ({"method": {"name": "promptfl"}}, 16),
        ({"method": {"name": "promptfl", "context_tokens": 7}}, 7),
        ({"method": {"name": "ditto"}}, 16),
        ({"method": {"name": "fedpha", "shared_tokens": 9}}, 9),
        ({"method": {"name": "clip_adapter"}}, 4),
        ({"method": {"name": "promptfl"}, "evaluation": {"local_only_tokens": 5}}, 5),
    ],
)
def test_local_only_has_as_many_tokens_as_the_method(
    sections: dict[str, Any], tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, _, line = baseline(small_config(**sections), monkeypatch)
    assert (method.context_tokens, line["context_tokens"]) == (tokens, tokens)


def test_local_only_may_have_a_learning_rate_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate that suits the method is seldom the best one for training alone."""
    for own, expected in ((None, 0.3), (0.02, 0.02)):
        config = small_config(training={"lr": 0.3}, evaluation={"local_only_lr": own})
        _, training, _ = baseline(config, monkeypatch)
        assert training == replace(config.training, lr=expected)


def test_methods_without_text_prompts_have_no_tokens() -> None:
    for name in ("vpt", "clip_adapter", "zero_shot", "tip_adapter"):
        assert context_tokens(asdict(small_config(method={"name": name}).method)) is None


def test_the_embedded_clip_warns_of_other_images() -> None:
    assert unsuited_backbone(small_config()) is None
    folder = {"source": "folder", "root": "photos"}
    warning = unsuited_backbone(small_config(data=folder))
    assert warning is not None
    assert "backbone=" in warning
    assert "\n" not in warning
    large = {"model": "ViT-B-16", "pretrained": "openai", "device": "cpu"}
    assert unsuited_backbone(small_config(data=folder, backbone=large)) is None
