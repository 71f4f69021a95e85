"""The rows of the table of methods, computed from the methods themselves.

This requires PyTorch. `fedprompt methods` reads the rows stored in `methods.json` instead, and
computes only those of methods that are not in it.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fedprompt.backbone.loading import shape_only_clip
from fedprompt.evaluation.registry import all_protocols
from fedprompt.methods.base import Method, Task, uploaded_numbers
from fedprompt.methods.registry import METHODS

Row = tuple[str, ...]


def compute_rows(names: Sequence[str]) -> list[Row]:
    """Return one row per method: the cells under `method_table.COLUMNS`.

    Args:
        names: The methods. Each is built with its default config for a CLIP with ViT-B/16's shapes,
            without weights, and two classes.
    """
    # Only shapes matter here, so no weights are downloaded or allocated.
    clip = shape_only_clip("ViT-B-16")
    rows: list[Row] = []
    for name in names:
        cls = METHODS.get(name)
        method = cls(cls.Config(), clip, Task(("a class", "another class")))
        # The seed and the client id do not matter either: only names and shapes are printed.
        rows.append(
            (
                name,
                cls.source,
                _tensors(method.init_shared(0)),
                _tensors(method.init_private(0, 0)),
                f"{uploaded_numbers(method):,}",
                _needs(method),
                _strategy(method),
                _protocols(method),
            )
        )
    return rows


def _tensors(tensors: dict[str, Tensor]) -> str:
    """Format names and shapes; of more than three tensors, only their number and total size."""
    if not tensors:
        return "-"
    # Methods such as adapters of every layer would otherwise fill a page.
    if len(tensors) > 3:
        return f"{len(tensors)} tensors, {sum(t.numel() for t in tensors.values()):,} numbers"
    # An axis of 0 becomes as long as the client has images (`Method.init_private`).
    return ", ".join(
        f"{n} {'x'.join(str(s or 'images') for s in t.shape) or '1'}" for n, t in tensors.items()
    )


def _needs(method: Method) -> str:
    """Format what the method needs of an image, and what it needs in training only."""
    in_training = sorted(method.needs_to_train - method.needs)
    return ", ".join([*sorted(method.needs), *(f"{name} in training" for name in in_training)])


def _strategy(method: Method) -> str:
    """Format the strategy of the paper and the keys that it sets."""
    keys = dict(method.config.default_strategy)
    name = str(keys.pop("name"))
    return name + "".join(f", {key}={value}" for key, value in keys.items())


def _protocols(method: Method) -> str:
    """Format the list of protocols that can be used with the method."""
    missing = [name for name, protocol in all_protocols().items() if not protocol.suits(method)]
    return "all" if not missing else f"all but {', '.join(missing)}"
