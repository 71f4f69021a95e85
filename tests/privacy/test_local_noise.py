"""Noise on the client."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fedprompt.config.protection import PrivacyConfig
from fedprompt.errors import UserError
from fedprompt.federation.server_app import Federation
from fedprompt.privacy.accountant import epsilon
from fedprompt.privacy.local_noise import local_epsilon, protected
from fedprompt.simulation.inline_grid import InlineGrid
from fedprompt.workspace import Workspace

MakeWorkspace = Callable[..., Workspace]
PROMPTFL = {"name": "promptfl", "context_tokens": 2}
needs_accountant = pytest.mark.skipif(
    __import__("importlib.util").util.find_spec("dp_accounting") is None,
    reason="needs the extra 'dp'",
)


def test_the_change_is_clipped_over_all_tensors() -> None:
    received = {"a": torch.ones(2), "b": torch.zeros(1)}
    trained = {"a": torch.tensor([4.0, 1.0]), "b": torch.tensor([4.0])}
    config = PrivacyConfig(noise=0.0, clip=1.0, noise_seed=1)
    sent = protected(received, trained, config, server_round=1, client=0)
    np.testing.assert_allclose(sent["a"], [1.6, 1.0], rtol=1e-6)
    np.testing.assert_allclose(sent["b"], [0.8], rtol=1e-6)
    wide = PrivacyConfig(noise=0.0, clip=100.0)
    same = protected(received, trained, wide, server_round=1, client=0)
    assert all((same[n] == trained[n]).all() for n in trained)


def test_noise_has_the_stated_size_and_its_own_draw() -> None:
    zeros = {"a": torch.zeros(50_000), "b": torch.zeros(50_000)}

    def sent(config: PrivacyConfig, server_round: int = 1, client: int = 0) -> Any:
        return protected(zeros, zeros, config, server_round=server_round, client=client)

    secret = PrivacyConfig(noise=2.0, clip=0.3)
    drawn = sent(secret)
    assert float(drawn["a"].std()) == pytest.approx(0.6, rel=0.02)
    assert (drawn["a"] != drawn["b"]).any()
    assert (sent(secret)["a"] != drawn["a"]).any(), "from the operating system"
    fixed = PrivacyConfig(noise=2.0, clip=0.3, noise_seed=7)
    assert (sent(fixed)["a"] == sent(fixed)["a"]).all()
    assert (sent(fixed, client=1)["a"] != sent(fixed)["a"]).any()
    assert (sent(fixed, server_round=2)["a"] != sent(fixed)["a"]).any()


def test_a_change_that_is_not_finite_sends_noise_alone() -> None:
    """A reply without noise, or none, would show what happened to the client's training."""
    zeros, broken = torch.zeros(1000), torch.full((1000,), torch.nan)
    config = PrivacyConfig(noise=2.0, clip=0.3, noise_seed=7)
    sent = [
        protected({"a": zeros}, {"a": trained}, config, server_round=1, client=0)["a"]
        for trained in (zeros, broken, torch.full((1000,), torch.inf))
    ]
    assert float(sent[0].std()) == pytest.approx(0.6, rel=0.1)
    assert all((other == sent[0]).all() for other in sent[1:])


@needs_accountant
def test_a_noisy_reply_says_nothing_else(make_workspace: MakeWorkspace) -> None:
    workspace = make_workspace(method=PROMPTFL, privacy={"noise": 1.0, "clip": 0.1})
    federation = Federation(workspace, InlineGrid(workspace))
    federation.join()
    replies: list[Any] = []
    screen = federation.strategy.screen

    def watched(server_round: int, asked: Any, answers: Any) -> Any:
        replies.extend(answers)
        return screen(server_round, asked, replies)

    federation.strategy.screen = watched  # type: ignore[method-assign]
    line = federation.train_round(1)
    assert len(replies) == 4
    assert all(dict(r.content["metrics"]) == {"num-examples": 1} for r in replies)
    assert line["train"] is None
    assert line["privacy"] == {"epsilon": epsilon(0.5, 1, 1e-5), "delta": 1e-5}
    assert local_epsilon(PrivacyConfig(noise=1.0), 1) == epsilon(0.5, 1, 1e-5)


def test_noise_without_an_accountant_is_refused_at_once(
    make_workspace: MakeWorkspace, monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    workspace = make_workspace(method=PROMPTFL, privacy={"noise": 1.0})
    with pytest.raises(UserError, match=r"fedprompt\[dp\]"):
        Federation(workspace, InlineGrid(workspace))
