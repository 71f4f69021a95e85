"""No method's training adds numbers in an order that a GPU would leave open, but for attention."""

from __future__ import annotations

import re

import pytest
import torch

from fedprompt.data.dataset import ImageDataset
from fedprompt.data.features.table import FeatureTable
from fedprompt.methods.base import Method
from fedprompt.scoring import score_personal
from tests.support.doc_pages import DOCS
from tests.support.method_contract import clients, starts, train
from tests.support.unordered_sums import UnorderedSums


def test_only_fused_attention_adds_in_no_fixed_order_and_the_page_names_its_methods(
    method: Method, columns: FeatureTable, dataset: ImageDataset
) -> None:
    data = clients(columns, dataset)[1:2]
    received, private = starts(method, data)
    with UnorderedSums() as sums:
        if method.trainable:
            train(method, data, received, private, batch_size=12)  # every class twice
        score_personal(method, received, private, [(d.inputs, d.labels_N) for d in data])
    assert not sums.unordered
    assert not sums.refused
    line = re.search(r"^Fused attention .*$", (DOCS / "gpu.md").read_text(), re.MULTILINE)
    assert line
    assert (f"`{method.name}`" in line[0]) == (sums.fused_attention > 0), line[0]


@pytest.mark.parametrize("labels", [[0, 1, 2], [0, 1, 1]])
def test_rows_that_are_gathered_twice_are_noticed(labels: list[int]) -> None:
    table = torch.randn(3, 4, requires_grad=True)
    index = torch.tensor(labels)[:, None].expand(-1, 4)
    with UnorderedSums() as sums:
        table.gather(0, index).square().sum().backward()
    assert bool(sums.unordered) == (len(set(labels)) < 3)
