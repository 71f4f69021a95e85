"""FedLoCoOp: LoCoOp with other settings."""

from __future__ import annotations

from typing import Any

import torch

from fedprompt.backbone.clip import FrozenCLIP
from tests.support import twins


def test_it_is_locoop_with_the_settings_of_the_federation(clip: FrozenCLIP) -> None:
    ours: Any = twins.build(clip, "fedlocoop", context_tokens=4)
    same: Any = twins.build(clip, "locoop", context_tokens=4, ood_weight=0.1, top_share=0.05)
    shared, batch = twins.tensors(ours)[0], twins.batch(clip, local=True)
    found, expected = (twins.loss_of(m, shared, {}, batch) for m in (ours, same))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], term) for name, term in expected.items())
    assert ours.top_k == 1, "5 of 100 classes, of 6 at least one"
