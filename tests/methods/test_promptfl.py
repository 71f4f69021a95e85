"""PromptFL's prompt is CoOp's: hard words through open_clip's own tower give the same logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.methods.base import Task
from fedprompt.methods.registry import method_class
from fedprompt.rng import normal
from tests.support.builders import CLASS_NAMES, batch_of


def test_promptfl_is_coop(clip: FrozenCLIP) -> None:
    """Logits = exp(scale) * cos(v, g([SOS][ctx][class].[EOS])), loss = cross-entropy."""
    cls = method_class("promptfl")
    config = cls.Config(context_tokens=4, context_init="a photo of a")
    method = cls(config, clip, Task(CLASS_NAMES))
    v = F.normalize(normal((1, 7, clip.embed_dim), 1.0, 0, "images"), dim=-1)
    labels = torch.tensor([[0, 1, 2, 0, 1, 5, 3]])
    data = batch_of(v, labels)
    shared = {n: t[None] for n, t in method.init_shared(1).items()}
    encoded = method.encode(shared, {})
    text = clip.encode_text_raw([f"a photo of a {c}." for c in CLASS_NAMES])
    expected = clip.model.logit_scale.exp() * v[0] @ F.normalize(text, dim=-1).T
    ours = method.logits(encoded, data.inputs)[0]
    assert (ours - expected).abs().max() < 1e-4 * expected.abs().max()
    loss_terms = method.loss_terms(shared, {}, encoded, data)
    loss = F.cross_entropy(expected, labels[0])
    assert loss_terms["ce"].item() == pytest.approx(loss.item(), rel=1e-4)
