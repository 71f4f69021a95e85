"""Tip-Adapter against its cache written with one-hot values; both variants."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.schema import TrainingConfig
from fedprompt.data.features.inputs import Inputs
from fedprompt.errors import UserError
from fedprompt.methods.base import ClientData, Method, Task, Tensors, stack, uploaded_numbers
from fedprompt.training import train_clients
from tests.support import twins
from tests.support.builders import CLASS_NAMES, batch_of

K, B, N = 2, 5, 9
LABELS = torch.tensor([[0, 1, 1, 5, 2], [3, 3, 4, 0, 1]])
TRAIN_LABELS = torch.tensor([0, 0, 1, 2, 2, 2, 5, 5, 0])


def clients(clip: FrozenCLIP) -> list[ClientData]:
    return [
        ClientData(k, Inputs(twins.features(1, N, clip.embed_dim, seed=10 + k)[0]), TRAIN_LABELS)
        for k in range(K)
    ]


def filled(method: Method, clip: FrozenCLIP) -> list[Tensors]:
    return [
        method.init_private_from_data(method.init_private(1, d.client), d, seed=1)
        for d in clients(clip)
    ]


def twin(
    clip: FrozenCLIP, keys_ND: Tensor, features_BD: Tensor, alpha: float, beta: float
) -> Tensor:
    """The public code's few lines: affinity, exponential, one-hot values."""
    values = F.one_hot(TRAIN_LABELS, len(CLASS_NAMES)).float()
    cache = (-(beta - beta * features_BD @ keys_ND.T)).exp() @ values
    text = clip.encode_text_raw([f"a photo of a {name}." for name in CLASS_NAMES])
    return clip.model.logit_scale.exp() * features_BD @ F.normalize(text, dim=-1).T + alpha * cache


@pytest.mark.parametrize("fine_tune", [False, True])
def test_logits_are_clips_and_the_caches(clip: FrozenCLIP, fine_tune: bool) -> None:
    method = twins.build(clip, "tip_adapter", fine_tune=fine_tune, shots=4, alpha=2.0, beta=3.0)
    features = twins.features(K, B, clip.embed_dim)
    ours = method.logits(method.encode({}, stack(filled(method, clip))), Inputs(features))
    for k, data in enumerate(clients(clip)):
        twins.close(ours[k], twin(clip, data.inputs.features, features[k], 2.0, 3.0))


def test_fine_tuned_keys_have_the_twins_loss_and_gradients(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "tip_adapter", fine_tune=True, shots=4)
    private = stack(filled(method, clip))
    keys = private["keys"].requires_grad_()
    batch = batch_of(twins.features(K, B, clip.embed_dim), LABELS)
    loss_terms = method.loss_terms({}, private, method.encode({}, private), batch)
    ours = method.gradients(loss_terms, {"private.keys": keys}, batch)["private.keys"]
    assert ours is not None
    for k, data in enumerate(clients(clip)):
        own = data.inputs.features.clone().requires_grad_()
        expected = F.cross_entropy(twin(clip, own, batch.inputs.features[k], 1.17, 1.0), LABELS[k])
        assert loss_terms["ce"][k].item() == pytest.approx(expected.item(), rel=1e-4)
        (theirs,) = torch.autograd.grad(expected, own)
        for mine, gradient in zip(private["keys"][k].detach(), ours[k], strict=True):
            (n,) = [i for i in range(N) if torch.equal(data.inputs.features[i], mine)]
            assert torch.allclose(gradient, theirs[n], atol=1e-4 * float(theirs.abs().max()))


def test_nothing_is_shared_and_the_global_model_is_zero_shot(clip: FrozenCLIP) -> None:
    method, zero_shot = twins.build(clip, "tip_adapter"), twins.build(clip, "zero_shot")
    assert method.init_shared(1) == {}
    assert uploaded_numbers(method) == 0
    assert method.has_global
    inputs = Inputs(twins.features(1, B, clip.embed_dim))
    encoded = method.encode({}, None)
    assert torch.equal(method.logits(encoded, inputs), zero_shot.logits(encoded, inputs))
    assert method.class_embeddings(encoded) is not None
    assert method.class_embeddings(method.encode({}, stack(filled(method, clip)))) is None


def test_an_empty_memory_says_nothing(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "tip_adapter")
    inputs = Inputs(twins.features(1, B, clip.embed_dim))
    empty = method.encode({}, stack([method.init_private(1, 0)]))
    assert torch.equal(method.logits(empty, inputs), method.logits(method.encode({}, None), inputs))


def test_only_the_f_variant_trains_and_every_client_keeps_its_length(clip: FrozenCLIP) -> None:
    still = twins.build(clip, "tip_adapter")
    assert not still.trainable
    assert still.frozen == {"private.keys", "private.owners"}
    method = twins.build(clip, "tip_adapter", fine_tune=True, shots=4)
    assert method.trainable
    first, second = clients(clip)
    data = [first, ClientData(1, second.inputs[:4], second.labels_N[:4])]
    before = [method.init_private_from_data(method.init_private(1, d.client), d, 1) for d in data]
    assert [len(memory["keys"]) for memory in before] == [N, 4]
    config = TrainingConfig(
        optimizer="sgd", lr=0.01, batch_size=4, local_epochs=3, momentum_state="keep"
    )
    results = train_clients(
        method, [{}] * K, before, data, config, seed=1, server_round=1, rounds=2
    )
    for old, result in zip(before, results, strict=True):
        assert result.shared == {}
        assert torch.equal(result.private["owners"], old["owners"])
        assert (result.private["keys"] != old["keys"]).any(-1).all()
        assert result.momentum["private.keys"].shape == old["keys"].shape
    again = train_clients(
        method,
        [{}] * K,
        [result.private for result in results],
        data,
        config,
        seed=1,
        server_round=2,
        rounds=2,
        momentum=[result.momentum for result in results],
    )
    assert [len(result.private["keys"]) for result in again] == [N, 4]


def test_new_classes_are_refused_with_a_reason(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "tip_adapter", Task(CLASS_NAMES[:3]))
    assert method.no_transfer_reason is not None
    assert "memory" in method.no_transfer_reason
    with pytest.raises(UserError, match="beta"):
        twins.build(clip, "tip_adapter", beta=0.0)
