from __future__ import annotations

import pytest
import torch

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.methods.base import stack
from tests.support import twins
from tests.support.twins import SIZES

N = len(SIZES)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_two_rounds_by_hand(clip: FrozenCLIP, momentum: float) -> None:
    """w is trained as if v were not there; v is pulled to the w that was received."""
    method = twins.build(clip, "ditto", options={"context_tokens": 3}, lam=3.0)
    training, data = twins.config(momentum=momentum), twins.clients(clip)
    received = method.init_shared(1)
    private = [method.init_private(1, k) for k in range(N)]
    v = [received["ctx"].clone() for _ in range(N)]
    for server_round in (1, 2):
        results = twins.train(method, [received] * N, private, data, training, server_round)
        w = received["ctx"]
        for k, result in enumerate(results):
            global_part = twins.local_sgd(
                data[k], training, server_round, w, lambda p, x, y: twins.ce_gradient(clip, p, x, y)
            )
            before = v[k]
            v[k] = twins.local_sgd(
                data[k],
                training,
                server_round,
                before,
                lambda p, x, y, w=w: twins.ce_gradient(clip, p, x, y) + 3.0 * (p - w),
            )
            twins.near(result.shared["ctx"], global_part, w)
            twins.near(result.private["ditto.shared.ctx"], v[k], before)
        private = [r.private for r in results]
        received = {"ctx": torch.stack([r.shared["ctx"] for r in results]).mean(0)}


def test_a_client_predicts_with_its_copy_and_the_server_with_the_shared_prompt(
    clip: FrozenCLIP,
) -> None:
    method = twins.build(clip, "ditto", options={"context_tokens": 3})
    shared = {n: t[None] for n, t in method.init_shared(1).items()}
    private = stack([method.init_private(1, k) for k in range(twins.K)])
    private["ditto.shared.ctx"] = (
        private["ditto.shared.ctx"] + torch.tensor([0.1, -0.1, 0.2])[:, None, None]
    )
    data = twins.batch(clip)
    personal = method.logits(method.encode(shared, private), data.inputs)
    general = method.logits(method.encode(shared, None), data.inputs)
    for k in range(twins.K):
        own = twins.class_features(clip, private["ditto.shared.ctx"][k])
        twins.close(personal[k], clip.logit_scale * data.inputs.features[k] @ own.T)
        common = twins.class_features(clip, shared["ctx"][0])
        twins.close(general[k], clip.logit_scale * data.inputs.features[k] @ common.T)


def test_both_models_have_private_prompts_of_their_own(clip: FrozenCLIP) -> None:
    """The shared model trains as FedRSCLIP alone would; the copy is another FedRSCLIP."""
    method, plain = twins.build(clip, "ditto", base="fedrsclip"), twins.build(clip, "fedrsclip")
    training, data = twins.config(), twins.clients(clip)
    start = [method.init_private(1, k) for k in range(N)]
    assert set(start[0]) == {"ctx", "ditto.shared.ctx", "ditto.private.ctx"}
    assert torch.equal(start[0]["ctx"], start[0]["ditto.private.ctx"])
    shared = method.init_shared(1)
    results = twins.train(method, [shared] * N, start, data, training, 1)
    alone = twins.train(
        plain, [shared] * N, [plain.init_private(1, k) for k in range(N)], data, training, 1
    )
    for k in range(N):
        twins.near(results[k].shared["ctx"], alone[k].shared["ctx"], shared["ctx"])
        twins.near(results[k].private["ctx"], alone[k].private["ctx"], start[k]["ctx"])
        assert not torch.equal(results[k].private["ditto.private.ctx"], results[k].private["ctx"])
    free = twins.build(clip, "ditto", base="fedrsclip", lam=0.0)
    for result in twins.train(free, [shared] * N, start, data, training, 1):
        twins.near(result.private["ditto.shared.ctx"], result.shared["ctx"], shared["ctx"])
        assert result.losses["ditto.prox"] == 0
