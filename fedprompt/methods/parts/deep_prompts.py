"""Text prompts at the inputs of several layers, and start words of which only some are learned.

MaPLe, IVLP, DualPrompt and the methods that derive from them hold a `DeepText`; FedMGP, VPT,
pFedMMA and FedRSCLIP use the functions alone.

Sources: MaPLe (Khattak et al., CVPR 2023, arXiv 2210.03117) and PromptSRC (Khattak et al., ICCV
2023, arXiv 2307.06948), whose public code fixes two conventions that are followed here:

- Depth J counts the first layer: one prompt among the token embeddings, J - 1 that replace its
  hidden states at the inputs of layers 1 .. J - 1; later layers receive the output of the layer
  before.
- Only the first M tokens of the start words are learned. The others stay in the text, frozen:
  "a photo of a" with M = 2 learns "a photo" and reads "[ctx] of a {class}.".

How we differ: J is at most the tower's number of layers, and a surplus is logged, while the
public code ignores or misses it. Words that do not split after M tokens are refused, while the
public code starts at random for M > 4 and cuts a word in two otherwise.

Shape suffixes: K clients, J layers with prompts, M tokens, d text width, w image-tower width, i and
o widths of a coupling's input and output, C classes, D joint embedding.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.text_tokens import token_count
from fedprompt.errors import UserError
from fedprompt.methods.base import Task
from fedprompt.methods.parts.prompts import PromptSource
from fedprompt.rng import normal

log = logging.getLogger(__name__)


class DeepText:
    """Deep text prompts (J, M, d) for one class list; `prompts[0]` joins the token embeddings.

    Args:
        clip: the frozen backbone.
        task: class names.
        tokens: M.
        depth: J; a surplus over the number of layers is logged and dropped.
        words: start words of the first layer's prompt, or None for N(0, std^2).
        std: standard deviation of the random starts; deeper layers always start at random.

    Raises:
        UserError: no word of `words` ends after `tokens` tokens.
    """

    def __init__(
        self, clip: FrozenCLIP, task: Task, tokens: int, depth: int, words: str | None, std: float
    ) -> None:
        self.depth = layers_within("text", depth, len(clip.text.blocks))
        self.std = std
        learned, frozen = split_words(clip, words, tokens) if words else (None, "")
        # Frozen words are tokenised as a part of the class name: "[ctx] of a {class}.".
        names = tuple(f"{frozen} {name}".strip() for name in task.class_names)
        self.source = PromptSource(clip, Task(names), tokens, init_text=learned, init_std=std)

    def start(self, seed: int, *purpose: str | int) -> Tensor:
        """Starting prompts (J, M, d)."""
        first_Md = self.source.start(seed, *purpose)
        shape = (self.depth - 1, *first_Md.shape)
        return torch.cat([first_Md[None], normal(shape, self.std, seed, *purpose, "deep")])

    def classes(self, prompts_KJMd: Tensor) -> Tensor:
        """L2-normalised class features (K, C, D)."""
        return F.normalize(self.raw(prompts_KJMd), dim=-1)

    def raw(self, prompts_KJMd: Tensor) -> Tensor:
        """Class features (K, C, D) as the text tower gives them, not normalised."""
        first, deep = split_layers(prompts_KJMd)
        return self.source.tower(first, deep)


@cache  # so that the warning is logged once per process and not on every call
def layers_within(tower: str, asked: int, available: int) -> int:
    """Number of a tower's layers that get prompts; a warning is logged if it has too few layers.

    Args:
        tower: name of the tower, for the warning.
        asked: number of layers in the config.
        available: number of layers of the tower.

    Returns:
        The smaller of the two numbers.
    """
    if asked > available:
        log.warning(
            "the method asks for %d %s layers, but this backbone has %d; all of them are used",
            asked,
            tower,
            available,
        )
    return min(asked, available)


def split_layers(prompts_KJM_: Tensor) -> tuple[Tensor, Tensor | None]:
    """The first layer's prompt (K, M, ...) and the deep ones (K, J - 1, M, ...), None if J is 1."""
    deep = prompts_KJM_[:, 1:] if prompts_KJM_.shape[1] > 1 else None
    return prompts_KJM_[:, 0], deep


def coupled(prompts_JMi: Tensor, weight_Joi: Tensor, bias_Jo: Tensor) -> Tensor:
    """The prompts of one tower as linear functions of the other tower's, P_j W_j^T + b_j.

    Args:
        prompts_JMi: prompts (..., J, M, i).
        weight_Joi: a matrix for each layer, (..., J, o, i).
        bias_Jo: biases (..., J, o).

    Returns:
        Prompts (..., J, M, o).
    """
    return prompts_JMi @ weight_Joi.transpose(-1, -2) + bias_Jo[..., None, :]


def split_words(clip: FrozenCLIP, words: str, tokens: int) -> tuple[str, str]:
    """Split start words into those that are learned and those that stay in the text.

    Args:
        clip: the frozen backbone, for its tokenizer.
        words: start words; underscores are read as spaces.
        tokens: number of tokens that are learned.

    Returns:
        The words that make up the first `tokens` tokens, and the remaining words.

    Raises:
        UserError: no word ends after `tokens` tokens.
    """
    parts = words.replace("_", " ").split()
    # A word may be several tokens, so the running length is counted by the tokenizer.
    lengths = [token_count(clip, " ".join(parts[: i + 1])) for i in range(len(parts))]
    if tokens not in lengths:
        raise UserError(
            f"context_init '{words}' cannot be split after {tokens} tokens: its words end after "
            f"{', '.join(map(str, lengths)) or 'none'}; change the words or the tokens."
        )
    cut = lengths.index(tokens) + 1
    return " ".join(parts[:cut]), " ".join(parts[cut:])
