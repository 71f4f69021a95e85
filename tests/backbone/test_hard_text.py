"""Packed hand-written prompts against open_clip's own pass over all positions."""

from __future__ import annotations

import pytest

from fedprompt.backbone import hard_text
from fedprompt.backbone.clip import FrozenCLIP
from tests.support.builders import CLASS_NAMES, random_clip
from tests.support.comparison import relative


@pytest.mark.parametrize(
    "texts",
    [
        [f"a photo of a {name}." for name in CLASS_NAMES],
        [f"{name}, seen from above" for name in CLASS_NAMES],
        list(CLASS_NAMES),
        ["a photo", "a photo of a photo", "a photo of"],
        ["a river", "a river"],
        ["a river"],
        ["", "sea"],
    ],
)
@pytest.mark.parametrize("at_once", [1024, 4])
def test_packed_texts_equal_open_clips_pass(
    clip: FrozenCLIP, monkeypatch: pytest.MonkeyPatch, texts: list[str], at_once: int
) -> None:
    monkeypatch.setattr(hard_text, "TEXTS_AT_ONCE", at_once)
    found, expected = clip.encode_texts(texts), clip.encode_text_raw(texts)
    assert found.dtype == expected.dtype
    assert relative(found, expected) < 1e-5


def test_common_words_are_encoded_once(clip: FrozenCLIP) -> None:
    """`[SOS] a photo of a` for all classes, and `river . [EOT]` for each."""
    before = clip.positions_encoded
    clip.encode_texts([f"a photo of a {name}." for name in ("river", "forest", "beach")])
    assert clip.positions_encoded - before == 5 + 3 * 3


def test_a_tower_that_cannot_be_packed_takes_open_clips_pass() -> None:
    clip = random_clip(text_cfg={"layers": 1})
    texts = [f"a photo of a {name}." for name in CLASS_NAMES]
    before = clip.positions_encoded
    assert relative(clip.encode_texts(texts), clip.encode_text_raw(texts)) == 0
    assert clip.positions_encoded - before == 77 * len(texts)
