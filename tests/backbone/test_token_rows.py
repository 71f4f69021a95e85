"""Texts that a tokenizer would cut or confuse without a word are refused, on every path."""

from __future__ import annotations

import unicodedata

import pytest
import torch
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.text_tokens import context_init, token_count, tokenise
from fedprompt.backbone.token_rows import token_rows
from fedprompt.methods.base import Task
from fedprompt.methods.registry import method_class
from tests.support.refusals import refused

TWINS = {
    "case": ("Apple", "apple"),
    "composed accents": ("caf\u00e9", unicodedata.normalize("NFD", "caf\u00e9")),
    "wide letters": ("\uff43\uff41\uff54", "cat"),
    "HTML entities": ("rock &amp; roll", "rock & roll"),
    "ligatures": ("\ufb01sh", "fish"),
    "quotation marks": ("men\u2019s shoes", "men's shoes"),
    "underscores": ("sea_lake", "sea lake"),
    "spaces": ("sea  lake ", "sea lake"),
}


@pytest.mark.parametrize("case", TWINS)
def test_two_classes_with_one_prompt_are_refused(clip: FrozenCLIP, case: str) -> None:
    first, second = TWINS[case]
    names = ["dog", first, "fox", second]
    for name in ("zero_shot", "promptfl"):
        method = method_class(name)
        line = refused(lambda method=method: method(method.Config(), clip, Task(tuple(names))))
        assert " ".join(first.split()) in line
        assert " ".join(second.split()) in line
        assert "classes 1 and 3" in line


@pytest.mark.parametrize("name", ["&nbsp;", "___", "&ensp; _", ""])
def test_a_class_without_any_token_is_refused(clip: FrozenCLIP, name: str) -> None:
    for method in ("zero_shot", "promptfl"):
        kind = method_class(method)
        line = refused(lambda kind=kind: kind(kind.Config(), clip, Task(("dog", name))))
        assert f"'{name}'" in line
        assert "class 1" in line


@pytest.mark.parametrize("special", ["<end_of_text>", "<start_of_text>"])
def test_special_tokens_inside_a_text_are_refused(clip: FrozenCLIP, special: str) -> None:
    for call in (
        lambda: clip.zero_shot_classifier(["fox", "dog"], [f"a {special} of a {{}}."]),
        lambda: clip.encode_text_raw([f"a {special} photo"]),
        lambda: context_init(clip, f"a {special}", 2, torch.zeros(2, clip.text.width)),
        lambda: token_count(clip, special),
    ):
        line = refused(call)
        assert "special token" in line
    # Underscores in class names are read as spaces, so there the text is harmless.
    assert len(tokenise(clip, ["fox", special], 4).ids_CL) == 2
    assert token_count(clip, "!! wow !!") > 1  # CLIP pads with the id of '!'


def test_a_text_longer_than_the_tower_is_refused_on_every_path(clip: FrozenCLIP) -> None:
    long = "very " * clip.text.context_length
    needed = clip.text.context_length + 4  # the words, "cat", ".", and two special tokens
    line = refused(lambda: clip.zero_shot_classifier(["cat", "dog"], [long + "{}."]))
    assert f"needs {needed} text positions" in line
    assert f"has {clip.text.context_length}" in line
    for call in (
        lambda: clip.encode_text_raw([long]),
        lambda: tokenise(clip, ["cat", long], 0),
        lambda: token_count(clip, long),
        lambda: context_init(clip, long, 4, torch.zeros(4, clip.text.width)),
        lambda: method_class("fedtpg")(method_class("fedtpg").Config(), clip, Task(("a", long))),
        lambda: method_class("kgcoop")(
            method_class("kgcoop").Config(), clip, Task(("a", "b"), (f"{long} {{}}.",))
        ),
    ):
        assert "text positions" in refused(call)
    assert "at least" in refused(lambda: clip.encode_text_raw([long * 9]))


def test_a_text_that_just_fits_is_read_completely(clip: FrozenCLIP) -> None:
    fits = " ".join(["very"] * (clip.text.context_length - 2))
    ids_1L = token_rows(clip.tokenizer, clip.text, [fits], "tiny")
    assert torch.equal(ids_1L, clip.tokenizer([fits]))
    assert "text positions" in refused(lambda: clip.encode_text_raw([f"{fits} very"]))


def test_a_tokenizer_that_pads_with_the_end_of_the_text(clip: FrozenCLIP) -> None:
    end = int(clip.tokenizer([""]).max())

    def padded(texts: list[str], context_length: int = clip.text.context_length) -> Tensor:
        ids = clip.tokenizer(texts, context_length=context_length)
        after = torch.arange(ids.shape[1]) > ids.argmax(-1, keepdim=True)
        return torch.where(after & (ids == 0), end, ids)

    assert len(token_rows(padded, clip.text, ["cat", "!!", "a dog!"], "padded")) == 3
    line = refused(lambda: token_rows(padded, clip.text, ["a <end_of_text> b"], "padded"))
    assert "a <end_of_text> b" in line
