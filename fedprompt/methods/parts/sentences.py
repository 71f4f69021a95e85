"""Features of sentences about the classes: what `data.descriptions` holds, or the templates.

Suffixes: N sentences of each class, S of one class, T of all of them, C classes, D joint embedding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.errors import UserError
from fedprompt.methods.batch import Task


def sentence_features(clip: FrozenCLIP, task: Task, method: str) -> Tensor:
    """L2-normalised features (N, C, D): row n has the n-th sentence of every class.

    Args:
        clip: the frozen backbone.
        task: classes and sentences; templates stand in for classes without sentences.
        method: name of the method, for the error message.

    Raises:
        UserError: the classes do not have equally many sentences.
    """
    sentences = task.sentences()
    for name, own in zip(task.class_names, sentences, strict=True):
        if len(own) != len(sentences[0]):
            raise UserError(
                f"method {method} needs equally many sentences of each class in "
                f"data.descriptions: '{name}' has {len(own)}, '{task.class_names[0]}' has "
                f"{len(sentences[0])}."
            )
    # Frozen, so they are encoded once per class list: the n-th sentences of all classes.
    columns = [clip.encode_texts(of_n) for of_n in zip(*sentences, strict=True)]
    return F.normalize(torch.stack(columns), dim=-1)


def described(clip: FrozenCLIP, task: Task) -> tuple[Tensor, ...]:
    """L2-normalised features (S, D) of the sentences of each class, however many there are."""
    sentences = task.sentences()
    # In one call, which shares what they have in common.
    texts_TD = F.normalize(clip.encode_texts([text for own in sentences for text in own]), dim=-1)
    parts: tuple[Tensor, ...] = texts_TD.split([len(own) for own in sentences])
    return parts


def described_classes(clip: FrozenCLIP, task: Task) -> Tensor:
    """The mean features (1, C, D) of the sentences about each class, L2-normalised."""
    classes_CD = torch.stack([own_SD.mean(0) for own_SD in described(clip, task)])
    return F.normalize(classes_CD, dim=-1)[None]
