from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.errors import UserError
from fedprompt.methods.base import stack, uploaded_numbers
from tests.support import twins
from tests.support.builders import batch_of
from tests.support.twins import SIZES, K

N = len(SIZES)


def test_the_last_tokens_stay_and_all_are_trained_as_one_prompt(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "fedper", options={"context_tokens": 5}, private_tokens=2)
    whole = method.base.init_shared(1)["ctx"]
    training, data = twins.config(momentum=0.0), twins.clients(clip)
    shared, private = method.init_shared(1), [method.init_private(1, k) for k in range(N)]
    assert torch.equal(shared["ctx"], whole[:3])
    assert torch.equal(private[1]["fedper.ctx"], whole[3:])
    results = twins.train(method, [shared] * N, private, data, training, 1)
    for one, result in zip(data, results, strict=True):
        expected = twins.local_sgd(
            one, training, 1, whole, lambda p, x, y: twins.ce_gradient(clip, p, x, y)
        )
        twins.near(result.shared["ctx"], expected[:3], whole[:3])
        twins.near(result.private["fedper.ctx"], expected[3:], whole[3:])
    data_KB = twins.batch(clip)
    joined = stack([r.private for r in results[:K]])
    logits = method.logits(method.encode({"ctx": shared["ctx"][None]}, joined), data_KB.inputs)
    for k in range(K):
        prompt = torch.cat([shared["ctx"], joined["fedper.ctx"][k]])
        twin = clip.logit_scale * data_KB.inputs.features[k] @ twins.class_features(clip, prompt).T
        twins.close(logits[k], twin)
    assert not method.has_global


def test_whole_tensors_stay_by_name(clip: FrozenCLIP) -> None:
    base = twins.build(clip, "cocoop")
    names = set(base.init_shared(1))
    method = twins.build(clip, "fedper", base="cocoop", private=["linear*"], private_tokens=0)
    stays = {n for n in names if n.startswith("linear")}
    assert stays, names
    assert set(method.init_shared(1)) == names - stays
    assert set(method.init_private(1, 0)) == {f"fedper.{n}" for n in stays}
    shared = stack([method.init_shared(1) for _ in range(K)])
    private = stack([method.init_private(1, k) for k in range(K)])
    data = twins.batch(clip)
    ours = method.logits(method.encode(shared, private), data.inputs)
    both = stack([base.init_shared(1) for _ in range(K)])
    twins.close(ours, base.logits(base.encode(both, {}), data.inputs))


def test_both_parts_of_a_shared_prompt_are_at_rest(
    clip: FrozenCLIP, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = twins.build(clip, "fedper", base="cocoop", private=["linear*"], private_tokens=1)
    rest = torch.tensor([False, True])
    names = [f"shared.{n}" for n in method.base.init_shared(1)]
    monkeypatch.setattr(method.base, "at_rest", lambda *_: dict.fromkeys(names, rest))
    private = stack([method.init_private(1, k) for k in range(K)])
    received = stack([method.init_shared(1)] * K)
    found = method.at_rest(private, replace(twins.batch(clip).round_info, received=received))
    leaves = {f"shared.{n}" for n in method.init_shared(1)} | {f"private.{n}" for n in private}
    assert set(found) == leaves
    assert all(t is rest for t in found.values())


def test_private_prompts_of_the_base_stay_too(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "fedper", base="fedrsclip", private_tokens=1)
    plain = twins.build(clip, "fedrsclip")
    assert uploaded_numbers(method) == uploaded_numbers(plain) * 3 // 4
    shared = stack([method.init_shared(1) for _ in range(K)])
    private = stack([method.init_private(1, k) for k in range(K)])
    data = twins.batch(clip)
    data = batch_of(data.inputs, data.labels_KB, data.mask_KB, received=shared)
    ours = method.loss_terms(shared, private, method.encode(shared, private), data)
    s, p = stack([plain.init_shared(1)] * K), stack([plain.init_private(1, k) for k in range(K)])
    theirs = plain.loss_terms(s, p, plain.encode(s, p), data)
    for name, value in theirs.items():
        twins.close(ours[name], value, name)


def test_the_base_sees_whole_received_tensors(clip: FrozenCLIP) -> None:
    """A base that compares with what it received must find the shapes that it knows."""
    method = twins.build(clip, "fedper", options={"context_tokens": 5}, private_tokens=2)
    seen: list[tuple[int, ...]] = []
    inner = method.base.loss_terms

    def spy(shared: Any, private: Any, encoded: Any, batch: Any) -> Any:
        seen.append(tuple(batch.round_info.received["ctx"].shape))
        return inner(shared, private, encoded, batch)

    method.base.loss_terms = spy
    shared = stack([method.init_shared(1) for _ in range(K)])
    private = stack([method.init_private(1, k) for k in range(K)])
    data = twins.batch(clip)
    data = batch_of(data.inputs, data.labels_KB, data.mask_KB, received=shared)
    method.loss_terms(shared, private, method.encode(shared, private), data)
    assert seen == [(K, 5, clip.text.width)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"private_tokens": 4, "options": {"context_tokens": 4}}, "4 tokens of 'ctx'"),
        ({"private_tokens": 0}, "'private_tokens'"),
        ({"private": ["cxt"]}, "names 'cxt'.*'ctx'"),
        ({"token_tensors": ["deep*"]}, "names 'deep\\*'"),
        ({"private_tokens": -1}, "at least 0"),
    ],
)
def test_splits_that_cannot_be(clip: FrozenCLIP, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        twins.build(clip, "fedper", **options)
