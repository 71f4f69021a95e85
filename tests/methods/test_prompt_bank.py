"""The prompt bank: twin of the mixture, keys and shares, empty pairs, and what a session leaves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import shape_only_clip
from fedprompt.data.features.inputs import Inputs
from fedprompt.messages import Update
from fedprompt.methods.base import ClientData, uploaded_numbers
from tests.support import twins
from tests.support.strategies import strategy_of_clients
from tests.support.twins import K

PAIRS = 3


def test_twin(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "prompt_bank", pairs=PAIRS, context_tokens=2, context_init=None)
    shared, batch = twins.tensors(method)[0], twins.batch(clip)
    # Pair 1 has no images yet.
    for g in (0, 2):
        shared[f"key.{g}"] = twins.draw(K, clip.embed_dim, seed=g)
    logits = method.logits(method.encode(shared, {}), batch.inputs)
    terms = twins.loss_of(method, shared, {}, batch)
    ours = twins.applied_gradients(method, shared, batch)
    for k in range(K):
        own = {n: shared[n][k].detach().requires_grad_(n in ours) for n in shared}
        images, labels = twins.images_of(batch, k)
        rows = []
        for v in images:
            weight = torch.stack([
                (method.cfg.sharpness * F.cosine_similarity(v, own[f"key.{g}"], dim=0)).exp()
                for g in (0, 2)
            ])  # fmt: skip
            mixed = sum(
                w * twins.class_features(clip, own["ctx"] + own[f"bias.{g}"])
                for w, g in zip(weight / weight.sum(), (0, 2), strict=True)
            )
            rows.append(clip.logit_scale * mixed @ v)
        expected = torch.stack(rows)
        twins.close(logits[k][batch.mask_KB[k]], expected, "logits")
        loss = F.cross_entropy(expected, labels)
        twins.close(terms["ce"][k], loss, "loss")
        names = ["ctx", "bias.0", "bias.2"]
        for n, theirs in zip(
            names, torch.autograd.grad(loss, [own[n] for n in names]), strict=True
        ):
            twins.close(ours[n][k], theirs, n)
        assert float(ours["bias.1"][k].abs().max()) == 0


def test_keys_and_shares(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "prompt_bank", pairs=PAIRS)
    features = twins.features(1, 5, clip.embed_dim)[0]
    data = ClientData(0, Inputs(features), torch.tensor([0, 3, 1, 4, 4]))
    keys = method.shared_from_data(data)
    twins.close(keys["key.0"], (features[0] + features[1]) / 2)
    twins.close(keys["key.1"], features[2:].mean(0))
    assert not keys["key.2"].any()
    # Class counts of the first client are 1, 2, 0, 1, 0, 1.
    sent, _ = method.end_round(twins.tensors(method)[0], {}, twins.batch(clip).round_info)
    assert sent["expert_shares"][0].tolist() == pytest.approx([0.4, 0.4, 0.2])


def test_without_keys_all_pairs_count_the_same(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "prompt_bank", pairs=PAIRS)
    shared, inputs = twins.tensors(method)[0], twins.batch(clip).inputs
    each = method.encode(shared, {})["pairs"].mean(1)
    logits = method.logits(method.encode(shared, {}), inputs)
    twins.close(logits, clip.logit_scale * inputs.features @ each.transpose(-1, -2))


def test_pairs_of_absent_classes_stay(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "prompt_bank", pairs=PAIRS)
    start = {n: t.numpy() + 1 for n, t in method.init_shared(1).items()}
    strategy = strategy_of_clients(1, "per_expert", shapes={n: t.shape for n, t in start.items()})
    arrays = {n: t + 1 for n, t in start.items()}
    arrays["expert_shares"] = torch.tensor([0.25, 0.75, 0.0]).numpy()
    mean = strategy.aggregate(1, start, [Update(0, arrays, 8)])
    for n in ("bias.2", "key.2"):
        assert (mean[n] == start[n]).all()
    for n in ("ctx", "bias.0", "key.1"):
        assert (mean[n] == arrays[n]).all()


def test_upload_on_vit_b16() -> None:
    method = twins.build(shape_only_clip("ViT-B-16"), "prompt_bank")
    assert uploaded_numbers(method) == 8 * (4 * 512 + 512 + 1) + 4 * 512
