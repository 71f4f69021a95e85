"""Words that name nothing in a class list: prompts that attract images of unknown classes.

Source: NegLabel (Negative Label Guided OOD Detection with Pretrained Vision-Language Models, Jiang
et al., ICLR 2024, arXiv 2403.20078), "NegMining": of a corpus of words, those are taken whose
similarity to the class names is lowest. The similarity of a word to all names is the 95th
percentile of its cosines, which a few names that are like each word do not decide; texts are
"The nice {word}.".

How we differ: the corpus of the paper is 70,000 nouns and adjectives of WordNet, of which 10,000
are taken. Ours is a list of everyday nouns that was written for this library
(`assets/everyday_nouns.json`), so that nothing needs to be downloaded.

Suffixes: W words, C classes, D joint embedding.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from importlib import resources

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.errors import UserError

TEMPLATE = "The nice {}."
"""The authors' prompt for names and for nouns."""
PERCENTILE = 0.95


@cache
def everyday_nouns() -> tuple[str, ...]:
    """The corpus, in alphabetical order."""
    path = resources.files("fedprompt.backbone") / "assets" / "everyday_nouns.json"
    return tuple(json.loads(path.read_text(encoding="utf-8")))


def candidates(class_names: Sequence[str], count: int, where: str) -> tuple[str, ...]:
    """The words of the corpus that are no class names.

    Args:
        class_names: C names; underscores count as spaces.
        count: how many words are needed at least.
        where: the key that asks for so many, for messages.

    Raises:
        UserError: there are fewer words.
    """
    names = {name.replace("_", " ").lower() for name in class_names}
    words = tuple(word for word in everyday_nouns() if word not in names)
    if count > len(words):
        raise UserError(
            f"'{where}' is {count}, but the list of words has {len(words)} that are no class "
            "names; give at most that many."
        )
    return words


def negative_words(
    clip: FrozenCLIP, class_names: Sequence[str], count: int, where: str
) -> tuple[str, ...]:
    """The words of the corpus that are least like the class names, the least alike first.

    Args:
        clip: the frozen backbone.
        class_names: C names; underscores count as spaces.
        count: number of words.
        where: the key that asks for so many, for messages.

    Returns:
        `count` different words, none of which is a class name.

    Raises:
        UserError: the corpus has fewer words.
    """
    words = candidates(class_names, count, where)
    names_CD = clip.zero_shot_classifier(class_names, [TEMPLATE])
    words_WD = clip.zero_shot_classifier(words, [TEMPLATE])
    ascending_WC = (words_WD @ names_CD.T).sort(-1).values
    alike_W = ascending_WC[:, int(PERCENTILE * len(class_names))]
    return tuple(words[i] for i in alike_W.argsort(stable=True)[:count].tolist())
