"""Learned text contexts: their config keys, their starting values and their class features.

Methods with text prompts hold a `PromptSource`. It gives the server the starting context and turns
the contexts of K clients into class features, in training and in evaluation.

Suffixes: M context tokens, d text width, C classes, D joint embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.text_sequences import checkpointed
from fedprompt.backbone.text_tokens import context_init
from fedprompt.backbone.text_tower import TextTower
from fedprompt.config.fields import option
from fedprompt.methods.base import MethodConfig
from fedprompt.methods.batch import Task
from fedprompt.methods.parts.normalised import normalised
from fedprompt.rng import normal

POSITIONS_AT_ONCE = 8192
"""Largest number of text positions in one pass of `classes_of_many`; it bounds the memory."""


@dataclass(frozen=True)
class RandomPromptConfig(MethodConfig):
    """The keys of a context that starts at random: CoOp's 16 tokens from N(0, 0.02^2)."""

    context_tokens: int = option(16, "context tokens M", ge=1)
    init_std: float = option(0.02, "standard deviation of the random start", gt=0)


@dataclass(frozen=True)
class PromptConfig(RandomPromptConfig):
    """The keys of a context that starts at random or from words.

    A paper's own defaults are set in its file, by declaring a field again.
    """

    context_init: str | None = option(
        None, "words to start from, e.g. 'a photo of a'; null = random"
    )


class PromptSource:
    """A text tower for one class list, and the starting values of the contexts that it takes.

    Args:
        clip: the frozen backbone.
        task: class names.
        tokens: number M of context tokens.
        position: where the class name stands, `end`, `middle` or `front`.
        init_text: words to start from; None for a random start.
        init_std: standard deviation of the random start.

    Raises:
        UserError: a class name and M tokens need more positions than the text tower has.
    """

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
        # One prompt is the least that can be encoded, even if its classes exceed the bound.
        self.prompts_at_once = max(1, POSITIONS_AT_ONCE // self.tower.positions)
        self.clip, self.tokens = clip, tokens
        self.init_text, self.init_std = init_text, init_std

    @classmethod
    def of(
        cls, config: RandomPromptConfig, clip: FrozenCLIP, task: Task, *, position: Any = "end"
    ) -> PromptSource:
        """The source that a method's prompt keys describe.

        Args:
            config: the method's config; number of tokens, start words and standard deviation.
            clip: the frozen backbone.
            task: class names.
            position: where the class name stands, `end`, `middle` or `front`.
        """
        # Methods that offer no start words have a `RandomPromptConfig`.
        words = config.context_init if isinstance(config, PromptConfig) else None
        return cls(
            clip,
            task,
            config.context_tokens,
            position=position,
            init_text=words,
            init_std=config.init_std,
        )

    def start(self, seed: int, *purpose: str | int) -> Tensor:
        """A starting context (M, d); where it is random, `seed` and `purpose` key the draw."""
        draw = normal((self.tokens, self.clip.text.width), self.init_std, seed, *purpose)
        return context_init(self.clip, self.init_text, self.tokens, draw)

    def classes(self, context: Tensor) -> Tensor:
        """L2-normalised class features (..., C, D) of contexts (..., M, d)."""
        # The tower returns raw features, whose lengths only PromptSRC's template mean needs.
        return normalised(self.tower(context))

    def classes_of_many(self, context_NMd: Tensor) -> Tensor:
        """L2-normalised class features (N, C, D) of many contexts, a bounded number at a time.

        If they are more than that, training keeps only the contexts and computes the tower again
        for the gradient, so that the activations of only one part are in memory. Values and
        gradients are the same.
        """
        parts = context_NMd.split(self.prompts_at_once)
        # Where the tower does not pack, it bounds the classes itself.
        if len(parts) == 1 or self.tower.transformer is None:
            return self.classes(context_NMd)
        return torch.cat([checkpointed(self.classes, part) for part in parts])

    def classes_per_image(self, context_KBMd: Tensor) -> Tensor:
        """`classes_of_many` of a context for each image: (K, B, C, D)."""
        classes_NCD = self.classes_of_many(context_KBMd.flatten(0, 1))
        classes_KBCD: Tensor = classes_NCD.unflatten(0, context_KBMd.shape[:2])
        return classes_KBCD
