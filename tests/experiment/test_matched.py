"""The baseline is matched to the method, and unsuitable choices are said."""

from __future__ import annotations

from dataclasses import asdict
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


def tokens_of_baseline(config: Config, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """The context tokens that local-only training gets, and those that the summary names."""
    built: list[Any] = []

    def with_method(method: Any) -> Any:
        built.append(method)
        return SimpleNamespace(config=config)

    monkeypatch.setattr(experiments, "Federation", lambda *_: None)
    monkeypatch.setattr(experiments, "run_reference", lambda *_: {"round": 3})
    workspace = cast("Any", SimpleNamespace(config=config, with_method=with_method))
    grid = cast("Any", SimpleNamespace(use=lambda _: None))
    loggers = cast("Loggers", None)
    line = experiments._local_only(workspace, grid, cast("Any", None), QuietDisplay(), loggers)
    assert line is not None
    return built[0].context_tokens, line["context_tokens"]


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
    assert tokens_of_baseline(small_config(**sections), monkeypatch) == (tokens, tokens)


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
