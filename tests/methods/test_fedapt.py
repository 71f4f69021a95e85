"""FedAPT against loops: a client with its own key, and the global model image by image."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import shape_only_clip
from fedprompt.config.schema import Config
from fedprompt.errors import UserError
from fedprompt.experiment.workspaces import open_workspace
from fedprompt.methods.base import Batch, uploaded_numbers
from tests.support import twins
from tests.support.builders import CLASS_NAMES, small_config
from tests.support.twins import B, K

OPTIONS = {"context_tokens": 2, "domains": 2, "tau": 0.3}


def with_lengths(clip: FrozenCLIP) -> Batch:
    """A batch whose features had different lengths before they were normalised."""
    batch = twins.batch(clip)
    norms = 1 + twins.draw(K, B, seed=5).abs()
    return replace(batch, inputs=replace(batch.inputs, norms=norms))


def classes_of(clip: FrozenCLIP, meta_CMd: Tensor, keys_Md: Tensor) -> Tensor:
    contexts = meta_CMd + meta_CMd * keys_Md
    rows = [
        twins.text_feature(clip, context, name)
        for context, name in zip(contexts, CLASS_NAMES, strict=True)
    ]
    return torch.stack(rows)


def test_twin_of_a_client(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "fedapt", **OPTIONS)
    shared, private = twins.tensors(method)
    private = {n: t.detach() for n, t in private.items()}
    private["domain"] = torch.stack([method.init_private(1, k)["domain"] for k in range(K)])
    batch = with_lengths(clip)
    terms = method.loss_terms(shared, private, method.encode(shared, private), batch)
    names = ("ctx", "query.weight")
    found = twins.gradients(terms, [shared[n] for n in names])
    assert batch.inputs.norms is not None
    for k in range(K):
        images, labels = twins.images_of(batch, k)
        lengths = batch.inputs.norms[k][batch.mask_KB[k]]
        meta, query = (shared[n][k].detach().requires_grad_() for n in names)
        domain = k % 2
        logits = clip.logit_scale * images @ classes_of(clip, meta, method.keys_DMd[domain]).T
        ce = F.cross_entropy(logits, labels)
        scores = (images * lengths[:, None]) @ query.T
        of_domain = F.cross_entropy(scores, torch.full((len(images),), domain))
        twins.close(terms["ce"][k], ce, "ce")
        twins.close(terms["domain"][k], of_domain, "domain")
        theirs = torch.autograd.grad(ce + of_domain, (meta, query))
        for name, ours, plain in zip(names, found, theirs, strict=True):
            twins.close(ours[k], plain, name)


def test_twin_of_the_global_model(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "fedapt", **OPTIONS)
    method.prompts_at_once = 2  # several parts
    shared, batch = twins.tensors(method)[0], with_lengths(clip)
    first = {n: t[:1].detach() for n, t in shared.items()}
    with torch.no_grad():
        ours = method.logits(method.encode(first, None), batch.inputs)
        for k in range(K):
            images, _ = twins.images_of(batch, k)
            for b, image in enumerate(images):
                scores = first["query.weight"][0] @ image
                weights = ((scores - scores.mean()) / scores.std() / 0.3).softmax(0)
                key = sum(w * one for w, one in zip(weights, method.keys_DMd, strict=True))
                classes = classes_of(clip, first["ctx"][0], key)
                twins.close(ours[k, b], clip.logit_scale * classes @ image, "logits")


def test_keys_and_domains(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "fedapt")
    assert method.keys_DMd.shape == (4, 24, clip.text.width)
    assert 0 <= float(method.keys_DMd.min()) < 0.1 < 0.9 < float(method.keys_DMd.max()) < 1
    assert torch.equal(method.keys_DMd, twins.build(clip, "fedapt").keys_DMd)
    domains = [int(method.init_private(1, k)["domain"].argmax()) for k in range(6)]
    assert domains == [0, 1, 2, 3, 0, 1]
    assert dict(method.config.default_strategy)["weights"] == "uniform"


def test_upload_on_vit_b16() -> None:
    method = twins.build(shape_only_clip("ViT-B-16"), "fedapt")
    assert uploaded_numbers(method) == 6 * 24 * 512 + 4 * 512


@pytest.mark.parametrize("name", ["fedapt", "feddeap"])
def test_the_number_of_domains_must_be_that_of_the_clients(name: str) -> None:
    partition = {"scheme": "domain", "clients": 4}

    def config(domains: int, **changes: str) -> Config:
        return small_config(
            method={"name": name, "domains": domains, "context_tokens": 2},
            strategy={"name": "auto"},
            data={"images_per_class": 2, "domains": ["savanna", "delta"]},
            partition=partition | changes,
        )

    with pytest.raises(UserError, match=r"2 domains \(savanna, delta\); set method\.domains=2"):
        open_workspace(config(4))
    with pytest.raises(UserError, match=r"partition\.domain_clients=equal"):
        open_workspace(config(2, domain_clients="proportional"))
    workspace = open_workspace(config(2))
    for client in range(4):
        own = workspace.method.init_private(1, client)["domain"]
        images = workspace.partition.train(client)
        assert set(workspace.dataset.domains_N[images]) == {int(own.argmax())}
