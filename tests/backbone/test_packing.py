"""Packed suffixes: every class reads exactly its own tokens."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from fedprompt.backbone.packing import Packing, pack

END = 99

SUFFIXES = st.lists(
    st.lists(st.integers(1, 4), min_size=0, max_size=6).map(lambda name: [*name, 7, END]),
    min_size=1,
    max_size=40,
)


def read_back(packing: Packing, c: int) -> list[int]:
    """The tokens that class c's end-of-text slot looks at, by depth."""
    bins, most = packing.end_slot_BE.shape
    index = int(packing.end_of_C[c])
    b = index // most
    assert b < bins
    slot = int(packing.end_slot_BE[b, index % most])
    seen = packing.visible_BSS[b, slot].nonzero().flatten()
    depth = packing.depth_BS[b, seen]
    order = depth.argsort()
    assert depth[order].tolist() == list(range(len(seen)))
    # Every token of the suffix sees exactly itself and those before it.
    for position, i in enumerate(seen[order].tolist()):
        assert set(packing.visible_BSS[b, i].nonzero().flatten().tolist()) == set(
            seen[order][: position + 1].tolist()
        )
    tokens: list[int] = packing.token_BS[b, seen[order]].tolist()
    return tokens


@settings(max_examples=150, deadline=None)
@given(SUFFIXES, st.sampled_from([2, 5, 17]), st.sampled_from([32, 512]))
def test_every_class_reads_its_own_tokens(
    suffixes: list[list[int]], prefix: int, width: int
) -> None:
    packing = pack(suffixes, prefix, width)
    for c, suffix in enumerate(suffixes):
        assert read_back(packing, c) == suffix
    assert packing.tokens <= sum(map(len, suffixes))
    assert packing.tokens <= packing.token_BS.numel()


def test_names_that_begin_alike_share_their_first_tokens() -> None:
    packing = pack([[1, 2, 3, 7, END], [1, 2, 4, 7, END], [5, 7, END]], 5, 512)
    # 1 2 are shared: (2 + 3 + 3) + 3 tokens instead of 5 + 5 + 3.
    assert packing.tokens == 11
    assert packing.token_BS.numel() == 11


def test_a_tree_larger_than_a_bin_is_cut_and_repeats_what_it_shares() -> None:
    many = [[1, 2, k, 7, END] for k in range(10, 90)]
    packing = pack(many, 5, 512)
    bins, slots = packing.token_BS.shape
    assert bins > 1
    assert slots <= 96
    assert packing.tokens == 2 * bins + 3 * 80
    assert [read_back(packing, c) for c in range(80)] == many


def test_equal_names_are_read_at_the_same_slot() -> None:
    packing = pack([[1, 7, END], [2, 7, END], [1, 7, END]], 5, 512)
    assert packing.end_of_C[0] == packing.end_of_C[2] != packing.end_of_C[1]


def test_few_free_slots() -> None:
    lengths = [3, 3, 4, 5, 3, 4, 3, 3, 6, 4] * 10
    suffixes = [[100 + c, *range(2, n), END] for c, n in enumerate(lengths)]
    packing = pack(suffixes, 5, 512)
    assert packing.token_BS.numel() <= 1.03 * packing.tokens


def test_one_very_long_name() -> None:
    packing = pack([[*range(2, 72), END], [1, 7, END]], 5, 512)
    assert packing.token_BS.shape[1] >= 71
