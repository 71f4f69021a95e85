"""Meta-prompt: a server step along the mean change of all tasks, with a rate for the regulator.

Source: Gradient-Regulated Meta-Prompt Learning for Generalizable Vision-Language Models (Li et al.,
ICCV 2023, arXiv 2303.06571), for methods whose clients are tasks and return meta-gradients (GRAM).
With w_k the tensors that client k returns, and K_t the clients of the round,

    w <- w + eta (1 / |K_t|) sum_k (w_k - w),     eta = prompt_rate or regulator_rate

All tasks count the same, whatever their numbers of images, as in meta-learning. Tensors whose names
begin with `regulator.` have a rate of their own, because they live on another scale than prompts;
without such tensors `prompt_rate` alone is used. RECONSTRUCTED: the paper is not federated, and its
outer optimiser was not readable to us. Both rates at 1 are the uniform average.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedprompt.config.fields import option
from fedprompt.federation.screening import Update
from fedprompt.federation.strategy import SharedPromptStrategy, StrategyConfig
from fedprompt.messages import Arrays

from .parts.vectors import changes, combined, moved

REGULATOR = "regulator."
"""How the names of the regulator's tensors begin."""


@dataclass(frozen=True)
class MetaPromptConfig(StrategyConfig):
    """Both rates 1: the clients' own steps."""

    name: str = option("meta_prompt", "strategy name")
    prompt_rate: float = option(1.0, "server rate of the prompts", gt=0)
    regulator_rate: float = option(1.0, "server rate of tensors `regulator.*`", gt=0)


class MetaPrompt(SharedPromptStrategy):
    """`shared <- shared + eta mean_k (shared_k - shared)`."""

    name = "meta_prompt"
    Config = MetaPromptConfig
    linear_in_updates = True
    config: MetaPromptConfig

    @property
    def weights_by_examples(self) -> bool:
        """All tasks count the same."""
        return False

    def aggregate(self, server_round: int, shared: Arrays, updates: list[Update]) -> Arrays:
        """The step, float32."""
        share_U = np.full(len(updates), 1 / len(updates))
        rates = [
            self.config.regulator_rate if name.startswith(REGULATOR) else self.config.prompt_rate
            for name in shared
        ]
        rate_P = np.repeat(rates, [last.size for last in shared.values()])
        return moved(shared, rate_P * combined(share_U, changes(shared, updates)))
