"""Class suffixes packed into bins of equal size, so that attention runs on a few dense blocks.

`TextTower` packs once per class list. After the learned context every class has a few tokens of its
own: its name, the full stop and the end-of-text token. Their number varies, and padding all classes
to the longest name would waste most of the work. Classes whose names begin with the same tokens
share them, because a hidden state depends on nothing but the tokens before it. So the suffixes form
a forest, in which a token sees its ancestors, itself and the prefix. Whole trees go into bins of S
slots; a tree larger than a bin is cut, and its parts repeat the tokens they share.

Shape suffixes: C classes, B bins, S slots of a bin, E end slots of a bin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch
from torch import Tensor

_ATTENTION = 0.7
"""Cost of attention per key, as a share of a slot's matrix products times 1 / width; measured on a
CPU. It only decides between bin sizes, never a result."""
_LARGEST = 96
"""Slots of the largest bin that is tried, unless one class alone needs more."""
_LARGEST_WITH_PREFIX = 240
"""The same where every bin repeats the prefix, which is then a small part of it."""


@dataclass(frozen=True)
class Packing:
    """Where every suffix token lies.

    Attributes:
        token_BS: token ids; a free slot holds an arbitrary token that no other slot looks at.
        depth_BS: number of tokens before this one in its class's suffix; its text position is
            that of the first suffix token plus this.
        visible_BSS: `[b, i, j]` is true where slot i looks at slot j.
        end_slot_BE: slots of end-of-text tokens, padded with 0.
        end_of_C: index into the flattened `end_slot_BE` of each class.
        tokens: slots in use.
    """

    token_BS: Tensor
    depth_BS: Tensor
    visible_BSS: Tensor
    end_slot_BE: Tensor
    end_of_C: Tensor
    tokens: int


def pack(
    suffixes: Sequence[Sequence[int]], prefix: int, width: int, *, repeats_prefix: bool = False
) -> Packing:
    """Pack the suffixes of C classes into bins of the size that costs least.

    Args:
        suffixes: token ids of every class after the context, up to the end-of-text token.
        prefix: number P of tokens before them, which every slot sees.
        width: d of the transformer. Small bins have fewer keys per slot, large bins fewer free
            slots; P and d decide which matters more.
        repeats_prefix: whether every bin computes the prefix again, as `text_bins.py` does.

    Returns:
        The position of every token; bins of one size, classes in the order of `suffixes`.
    """
    paths = [tuple(s) for s in suffixes]
    # A class never spans two bins, so no bin is smaller than the longest suffix.
    longest = max(len(p) for p in paths)
    # Sorted, so that suffixes with common beginnings are neighbours and equal suffixes merge.
    unique = sorted(set(paths))
    trees = [list(tree) for _, tree in groupby(unique, key=lambda p: p[0])]
    total = sum(_nodes(tree) for tree in trees)
    largest = max(longest, min(total, _LARGEST_WITH_PREFIX if repeats_prefix else _LARGEST))
    sizes = range(max(longest, min(16, largest)), largest + 1)

    def cost(size: int) -> float:
        slots = (size + prefix * repeats_prefix) * len(_fill(trees, size))
        return slots * (1 + _ATTENTION * (prefix + size) / width)

    best = min(sizes, key=cost)
    return _lay_out(paths, _fill(trees, best), best)


_Path = tuple[int, ...]


def _common(a: _Path, b: _Path) -> int:
    """Count the leading tokens that two suffixes share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))


def _nodes(paths: list[_Path]) -> int:
    """Count the different tokens of a tree of sorted suffixes."""
    shared = sum(_common(a, b) for a, b in pairwise(paths))
    return sum(len(p) for p in paths) - shared


def _fill(trees: list[list[_Path]], size: int) -> list[list[_Path]]:
    """Put trees into bins of `size` slots: largest first, each into the fullest bin with room.

    Best-fit decreasing needs at most 11/9 of the fewest possible bins, and in practice hardly more.
    """
    items = [(_nodes(part), part) for tree in trees for part in _cut(tree, size)]
    items.sort(key=lambda item: -item[0])
    bins: list[list[_Path]] = []
    # Numbers of the bins with each amount of room, so that a bin is found without a search.
    by_room: list[list[int]] = [[] for _ in range(size + 1)]
    for nodes, part in items:
        room = next((r for r in range(nodes, size + 1) if by_room[r]), None)
        if room is None:
            bins.append([])
            index, room = len(bins) - 1, size
        else:
            index = by_room[room].pop()
        bins[index].extend(part)
        by_room[room - nodes].append(index)
    return bins


def _cut(tree: list[_Path], size: int) -> list[list[_Path]]:
    """Cut a tree into parts of at most `size` tokens each, between sorted neighbours."""
    if _nodes(tree) <= size:
        return [tree]
    parts: list[list[_Path]] = []
    used = 0
    for path in tree:
        added = len(path) - (_common(parts[-1][-1], path) if parts else 0)
        if parts and used + added <= size:
            parts[-1].append(path)
            used += added
        else:
            parts.append([path])
            # The new part repeats the tokens that it shares with the previous one.
            used = len(path)
    return parts


def _lay_out(paths: list[_Path], bins: list[list[_Path]], size: int) -> Packing:
    """Build the tensors of a packing of `paths` in `bins`."""
    token = torch.full((len(bins), size), paths[0][-1])
    depth = torch.zeros(len(bins), size, dtype=torch.int64)
    # Free slots see themselves too: a softmax over nothing would give NaN.
    visible = torch.eye(size, dtype=torch.bool).repeat(len(bins), 1, 1)
    ends: dict[_Path, tuple[int, int]] = {}
    most = max(len(content) for content in bins)
    end_slot = torch.zeros(len(bins), most, dtype=torch.int64)
    used = 0
    for b, content in enumerate(bins):
        slot_of: dict[_Path, int] = {}
        for place, path in enumerate(content):
            for length in range(1, len(path) + 1):
                node = path[:length]
                if node in slot_of:
                    continue
                slot = slot_of[node] = len(slot_of)
                token[b, slot], depth[b, slot] = node[-1], length - 1
                if length > 1:
                    # The parent's row already holds all of its ancestors.
                    visible[b, slot] |= visible[b, slot_of[node[:-1]]]
            ends[path] = (b, place)
            end_slot[b, place] = slot_of[path]
        used += len(slot_of)
    end_of = torch.tensor([ends[p][0] * most + ends[p][1] for p in paths])
    return Packing(token, depth, visible, end_slot, end_of, used)
