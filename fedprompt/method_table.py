"""The generated table of methods, at the sizes of ViT-B/16."""

from __future__ import annotations

from rich.table import Table
from torch import Tensor

from fedprompt.clip import shape_only_clip
from fedprompt.methods import Task, all_methods


def _numbers(tensors: dict[str, Tensor]) -> str:
    if not tensors:
        return "-"
    return ", ".join(f"{n} {'x'.join(str(s) for s in t.shape)}" for n, t in tensors.items())


def method_table() -> Table:
    """One row per method: shared and private tensors, numbers uploaded, needs, source."""
    clip = shape_only_clip("ViT-B-16")
    table = Table(title="Methods (sizes at ViT-B/16, defaults)", title_justify="left")
    for heading in ("method", "shared", "private", "upload per round", "needs", "source"):
        table.add_column(heading, justify="right" if heading.startswith("upload") else "left")
    for name, cls in all_methods().items():
        method = cls(cls.Config(), clip, Task(("a class", "another class")))
        upload = method.uploaded_numbers()
        table.add_row(
            name,
            _numbers(method.init_shared(0)),
            _numbers(method.init_private(0, 0)),
            f"{upload:,}" if upload else "0",
            ", ".join(sorted(cls.needs)),
            cls.source,
        )
    return table
