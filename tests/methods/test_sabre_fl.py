from __future__ import annotations

import torch

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import ClientData, Task
from fedprompt.methods.sabre_fl import SabreFL, SabreFLConfig

TASK = Task(("river", "forest", "beach"))


def method_of(clip: FrozenCLIP, images: int) -> SabreFL:
    config = SabreFLConfig(images=images, options={"context_tokens": 2})
    config.check()
    return SabreFL(config, clip, TASK)


def test_embeddings_are_those_of_images_spread_over_the_clients(clip: FrozenCLIP) -> None:
    features = torch.nn.functional.normalize(torch.randn(10, clip.embed_dim), dim=-1)
    # Two views of five images; only those of the first view are sent.
    data = ClientData(0, Inputs(features), torch.zeros(5, dtype=torch.int64), views=2)
    sent = method_of(clip, 3).shared_from_data(data)
    assert set(sent) == {"embeddings"}
    torch.testing.assert_close(sent["embeddings"], features[[0, 2, 4]])
    assert len(method_of(clip, 8).shared_from_data(data)["embeddings"]) == 8


def test_nothing_but_the_embeddings_is_added(clip: FrozenCLIP) -> None:
    method = method_of(clip, 4)
    shared = method.init_shared(1)
    base = method.base.init_shared(1)
    assert set(shared) == {*base, "embeddings"}
    assert shared["embeddings"].shape == (4, clip.embed_dim)
    assert "shared.embeddings" in method.frozen
