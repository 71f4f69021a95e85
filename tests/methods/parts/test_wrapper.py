"""What all wrappers have in common: any base, its options, its needs, and nothing lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.schema import to_dict
from fedprompt.errors import UserError
from fedprompt.experiment.validate import validate
from fedprompt.methods.registry import method_class
from tests.support import twins
from tests.support.twins import SIZES

WRAPPERS = ("fedprox", "scaffold", "ditto", "fedper")
N = len(SIZES)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("base", ["promptfl", "kgcoop", "fedrsclip", "promptfolio"])
def test_every_wrapper_trains_around_a_base(clip: FrozenCLIP, wrapper: str, base: str) -> None:
    options = {"private_tokens": 1} if wrapper == "fedper" else {}
    method = twins.build(clip, wrapper, base=base, **options)
    data, training = twins.clients(clip), twins.config(lr=0.002, local_epochs=8)
    start = [method.init_private(1, k) for k in range(N)]
    results = twins.train(method, [method.init_shared(1)] * N, start, data, training, 1)
    again = twins.train(
        method, [r.shared for r in results], [r.private for r in results], data, training, 2
    )
    for first, second, before in zip(results, again, start, strict=True):
        assert second.losses["ce"] < first.losses["ce"]
        assert set(first.shared) == set(method.init_shared(1))
        assert set(first.private) == set(before)
        for n, t in first.private.items():
            assert t.shape == before[n].shape
            assert torch.isfinite(t).all()


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_clients_at_once_are_as_one_by_one(clip: FrozenCLIP, wrapper: str) -> None:
    options = {"private_tokens": 1} if wrapper == "fedper" else {}
    method = twins.build(clip, wrapper, base="fedrsclip", **options)
    data, training = twins.clients(clip), twins.config(lr=0.002)
    shared = [method.init_shared(1)] * N
    private = [method.init_private(1, k) for k in range(N)]
    together = twins.train(method, shared, private, data, training, 1)
    for k in range(N):
        (alone,) = twins.train(method, shared[:1], private[k : k + 1], data[k : k + 1], training, 1)
        for ours, theirs in (
            (together[k].shared, alone.shared),
            (together[k].private, alone.private),
        ):
            for n, t in theirs.items():
                torch.testing.assert_close(ours[n], t, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_base_s_declarations_are_passed_on(clip: FrozenCLIP, wrapper: str) -> None:
    options: dict[str, Any] = {"private_tokens": 1} if wrapper == "fedper" else {}
    visual = twins.build(clip, wrapper, base="maple", **options)
    assert "pixels" in visual.needs
    assert visual.images_at_once == method_class("maple").images_at_once
    local = {"base": "pfedmoap", "options": {"experts": 3}}
    if wrapper != "scaffold":
        peers = twins.build(clip, wrapper, **local, **options)
        assert peers.lr_scale["private.gate.q.weight"] == 5
        assert {"private.visits", "private.own.ctx"} <= peers.frozen
        assert peers.init_extras(1).keys() == {"peers.ctx", "peers.known"}
        raw = {"method": {"name": wrapper, **local, **options}}
        assert validate(raw).strategy.name == "nearest_peers"


def test_options_are_checked_completed_and_kept() -> None:
    raw = {"method": {"name": "fedprox", "base": "kgcoop", "options": {"kg_weight": 2.0}}}
    made = validate(raw)
    assert made.method.options["kg_weight"] == 2.0
    assert made.method.options["context_tokens"] == 4
    assert validate(to_dict(made)) == made


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"options": {"context_token": 4}}, "unknown key 'method.options.context_token'"),
        ({"options": {"context_tokens": 0}}, "method.options.context_tokens is 0"),
        ({"options": {"init_std": "much"}}, "method.options.init_std is 'much'"),
        ({"options": {"name": "kgcoop"}}, "method.options.name"),
        ({"options": 3}, "method.options is 3"),
        ({"base": "prompfl"}, "no method 'prompfl'. Did you mean 'promptfl'"),
        ({"base": "ditto"}, "'ditto', which wraps"),
        ({"base": "zero_shot"}, "'zero_shot', which trains nothing"),
        ({"base": "fedrsclip", "options": {"prompts": "shared"}}, "method.options: 'dpa'"),
    ],
)
def test_wrong_configs_are_named(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        validate({"method": {"name": "fedprox", **keys}})
    assert message in str(error.value)
    assert "\n" not in str(error.value)
