"""A text tower together with the starting values of its learned contexts."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.text_tower import TextTower, context_init
from fedprompt.methods.base import Task
from fedprompt.rng import normal


class PromptSource:
    """A text tower and the starting values of the contexts that it takes."""

    def __init__(
        self,
        clip: FrozenCLIP,
        task: Task,
        tokens: int,
        *,
        position: Any = "end",
        init_text: str | None = None,
        init_std: float = 0.02,
    ) -> None:
        self.tower = TextTower(clip, task.class_names, tokens, position=position)
        self.clip, self.tokens = clip, tokens
        self.init_text, self.init_std = init_text, init_std

    def start(self, seed: int, *purpose: str | int) -> Tensor:
        """A starting context (M, d): `init_text`'s embeddings, or N(0, init_std^2)."""
        draw = normal((self.tokens, self.clip.text.width), self.init_std, seed, *purpose)
        return context_init(self.clip, self.init_text, self.tokens, draw)

    def classes(self, context: Tensor) -> Tensor:
        """L2-normalised class features (..., C, D) of contexts (..., M, d)."""
        return F.normalize(self.tower(context), dim=-1)
