"""What every method promises about its tensors and its description."""

from __future__ import annotations

import inspect
import sys

import torch

from fedprompt.backbone.loading import shape_only_clip
from fedprompt.methods.base import Method, Task, uploaded_numbers
from fedprompt.methods.registry import all_methods
from tests.support.method_contract import (
    shapes,
)


def test_it_cites_first(method: Method) -> None:
    text = inspect.getdoc(sys.modules[type(method).__module__]) or ""
    assert text.splitlines()[0].endswith((".", ":")) or text.splitlines()[1]
    assert "Source" in text, "the docstring of the module names its paper"
    assert method.source


def test_what_it_needs_is_known_before_a_backbone_is_open(method: Method) -> None:
    assert type(method).needs_of(method.config) == method.needs


def test_tensors_are_seeded_float32_and_alike_for_all_clients(method: Method) -> None:
    for start in (method.init_shared, method.init_extras, lambda s: method.init_private(s, 2)):
        for n, value in start(1).items():
            assert value.dtype == torch.float32, n
            assert torch.isfinite(value).all(), n
            assert torch.equal(value, start(1)[n]), n
    assert shapes(method.init_private(1, 0)) == shapes(method.init_private(1, 7))
    names = [*method.init_shared(1), *method.init_extras(1)]
    assert len(names) == len(set(names)), "received tensors have names of their own"


def test_a_method_is_described_at_the_sizes_of_vit_b_16() -> None:
    clip = shape_only_clip("ViT-B-16")
    for name, cls in all_methods().items():
        described = cls(cls.Config(), clip, Task(("a class", "another class")))
        assert uploaded_numbers(described) >= 0, name
