"""The generated table of methods, at the sizes of ViT-B/16."""

from __future__ import annotations

from rich.console import Group
from torch import Tensor

from fedprompt.backbone.loading import shape_only_clip
from fedprompt.evaluation.registry import all_protocols
from fedprompt.methods.base import Method, Task
from fedprompt.methods.registry import all_methods
from fedprompt.reports.terminal import fields, fitted

PAGE = """# Methods

What each method shares with the server, what stays on the client, how many numbers a client uploads per round, what it needs of an image, the server rule of its paper (`strategy: auto`) and the protocols that say something about it. Sizes at ViT-B/16 with the defaults; tensors that grow with the classes are shown for two. Each is one file in `fedprompt/methods/`, whose docstring cites the paper and says how we differ.

Generated: `fedprompt methods --markdown > docs/methods.md`
"""  # noqa: E501
COLUMNS = ("method", "shared", "private", "upload", "needs", "server", "protocols", "source")


WIDEST = {"shared": 22, "private": 22, "needs": 18, "server": 20, "protocols": 26, "source": 40}
"""Of a column in a terminal, before its words are folded."""


def method_table(width: int) -> Group:
    """One row per method: its tensors, numbers uploaded per round, needs, server rule, protocols.

    Sizes are those of the defaults. Private tensors that grow with the classes are shown for two.
    """
    left = [head for head in COLUMNS if head != "upload"]
    name, *others = fields(COLUMNS, method_rows(), left=left, most=WIDEST)
    return fitted(name, others, width, title="Methods (sizes at ViT-B/16, defaults)")


def method_rows() -> list[tuple[str, ...]]:
    """The table's cells."""
    clip = shape_only_clip("ViT-B-16")
    rows: list[tuple[str, ...]] = []
    for name, cls in all_methods().items():
        config = cls.Config()
        method = cls(config, clip, Task(("a class", "another class")))
        rows.append(
            (
                name,
                _numbers(method.init_shared(0)),
                _numbers(method.init_private(0, 0)),
                f"{method.uploaded_numbers():,}",
                ", ".join(sorted(method.needs)),
                _rule(method),
                _protocols(method),
                cls.source,
            )
        )
    return rows


def methods_markdown() -> str:
    """The page of the documentation that holds the table."""
    head = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n"
    body = "".join(f"| {' | '.join(row)} |\n" for row in method_rows())
    return f"{PAGE}\n{head}{body}"


def _numbers(tensors: dict[str, Tensor]) -> str:
    """Tensors with their shapes; many are counted only."""
    if not tensors:
        return "-"
    if len(tensors) > 3:
        return f"{len(tensors)} tensors, {sum(t.numel() for t in tensors.values()):,} numbers"
    return ", ".join(f"{n} {'x'.join(str(s) for s in t.shape) or '1'}" for n, t in tensors.items())


def _rule(method: Method) -> str:
    rule = dict(method.server_rule(method.config))
    name = str(rule.pop("name"))
    return name + "".join(f", {key}={value}" for key, value in rule.items())


def _protocols(method: Method) -> str:
    """Which protocols say something about it."""
    missing = [name for name, protocol in all_protocols().items() if not protocol.suits(method)]
    return "all" if not missing else f"all but {', '.join(missing)}"
