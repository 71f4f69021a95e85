"""Meta-prompt: all tasks count the same; prompts and regulator have rates of their own."""

from __future__ import annotations

import numpy as np
import pytest

from fedprompt.config.fields import build
from fedprompt.errors import UserError
from fedprompt.federation.screening import Update
from strategies.meta_prompt import MetaPrompt, MetaPromptConfig

SHARED = {
    "ctx": np.array([1.0, 2.0], dtype=np.float32),
    "regulator.scale.ctx": np.array([1.0, 1.0], dtype=np.float32),
}


def step(**options: float) -> dict[str, list[float]]:
    config = MetaPromptConfig(**options)
    strategy = MetaPrompt(config, shapes={n: a.shape for n, a in SHARED.items()}, seed=1)
    changes = [np.array([1, 0], dtype=np.float32), np.array([0, 4], dtype=np.float32)]
    updates = [
        Update(k, {n: a + change for n, a in SHARED.items()}, num_examples=10 ** (3 * k))
        for k, change in enumerate(changes)
    ]
    return {n: a.tolist() for n, a in strategy.aggregate(1, SHARED, updates).items()}


def test_tasks_count_the_same_whatever_their_images() -> None:
    assert step() == {"ctx": [1.5, 4.0], "regulator.scale.ctx": [1.5, 3.0]}


def test_rates() -> None:
    found = step(prompt_rate=2.0, regulator_rate=0.5)
    assert found == {"ctx": [2.0, 6.0], "regulator.scale.ctx": [1.25, 2.0]}


@pytest.mark.parametrize("key", ["prompt_rate", "regulator_rate"])
def test_bad_options(key: str) -> None:
    with pytest.raises(UserError, match=key):
        build(MetaPromptConfig, {key: 0}, "strategy")
