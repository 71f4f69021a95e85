"""pFedPrompt: CoOp's prompt over 77 positions, and the memory by loops."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import ClientData, Method, Tensors, stack, uploaded_numbers
from tests.support import twins
from tests.support.builders import CLASS_NAMES, batch_of

K, B, N = 2, 5, 9
LABELS = torch.tensor([[0, 1, 1, 5, 2], [3, 3, 4, 0, 1]])
TRAIN_LABELS = [0, 0, 1, 2, 2, 2, 5, 5, 0]


def data(clip: FrozenCLIP, k: int) -> ClientData:
    features = twins.features(1, N, clip.embed_dim, seed=10 + k)[0]
    return ClientData(k, Inputs(features), torch.tensor(TRAIN_LABELS))


def memories(method: Method, clip: FrozenCLIP) -> Tensors:
    return stack(
        [
            method.init_private_from_data(method.init_private(1, k), data(clip, k), seed=1)
            for k in range(K)
        ]
    )


def twin(clip: FrozenCLIP, ctx: Tensor, k: int, features_BD: Tensor, alpha: float) -> Tensor:
    votes = torch.zeros(len(features_BD), len(CLASS_NAMES))
    for b, v in enumerate(features_BD):
        for key, label in zip(data(clip, k).inputs.features, TRAIN_LABELS, strict=True):
            votes[b, label] += math.exp(-1.0 * (1 - float(v @ key)))
    scale = clip.model.logit_scale.exp()
    return scale * features_BD @ twins.class_features(clip, ctx).T + alpha * votes


@pytest.mark.parametrize("in_training", [False, True])
def test_logits_loss_and_gradients(clip: FrozenCLIP, in_training: bool) -> None:
    method = twins.build(
        clip, "pfedprompt", context_tokens=4, alpha=2.0, memory_in_training=in_training
    )
    shared, _ = twins.tensors(method, 0.01, K)
    private = memories(method, clip)
    batch = batch_of(twins.features(K, B, clip.embed_dim), LABELS)
    encoded = method.encode(shared, private)
    logits = method.logits(encoded, batch.inputs)
    loss_terms = method.loss_terms(shared, private, encoded, batch)
    ours = method.gradients(loss_terms, {"shared.ctx": shared["ctx"]}, batch)["shared.ctx"]
    assert ours is not None
    for k in range(K):
        ctx = shared["ctx"][k].detach().requires_grad_()
        features = batch.inputs.features[k]
        twins.close(logits[k], twin(clip, ctx, k, features, alpha=2.0))
        trained = twin(clip, ctx, k, features, alpha=2.0 if in_training else 0.0)
        loss = F.cross_entropy(trained, LABELS[k])
        assert loss_terms["ce"][k].item() == pytest.approx(loss.item(), rel=1e-4)
        twins.close(ours[k], torch.autograd.grad(loss, ctx)[0])


def test_the_prompt_alone_is_shared(clip: FrozenCLIP) -> None:
    method, promptfl = twins.build(clip, "pfedprompt"), twins.build(clip, "promptfl")
    assert uploaded_numbers(method) == uploaded_numbers(promptfl)
    assert method.frozen == {f"private.{n}" for n in method.init_private(1, 0)}
    shared = {n: t[None] for n, t in method.init_shared(1).items()}
    assert torch.equal(shared["ctx"][0], promptfl.init_shared(1)["ctx"])
    inputs = Inputs(twins.features(1, B, clip.embed_dim))
    encoded = method.encode(shared, None)
    assert torch.equal(method.logits(encoded, inputs), promptfl.logits(encoded, inputs))
    assert method.class_embeddings(encoded) is not None
    personal = method.encode(shared, memories(method, clip))
    assert method.class_embeddings(personal) is None
    assert method.logits(personal, inputs).shape == (K, B, len(CLASS_NAMES))


def test_it_says_that_it_is_reconstructed() -> None:
    from fedprompt.methods import pfedprompt

    assert "reconstructed" in pfedprompt.PFedPrompt.source
    assert "RECONSTRUCTED" in (pfedprompt.__doc__ or "")
