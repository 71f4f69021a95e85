"""MaPLe against a plain twin, and what each way of sharing averages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import shape_only_clip
from fedprompt.config.fields import build
from fedprompt.config.schema import TrainingConfig
from fedprompt.errors import UserError
from fedprompt.methods.base import ClientData, Method, Task, Tensors, stack, uploaded_numbers
from fedprompt.methods.parts.deep_prompts import split_words
from fedprompt.methods.registry import method_class
from fedprompt.training import train_clients
from tests.support import twins
from tests.support.builders import CLASS_NAMES, batch_of, random_clip

K, B = 2, 5
SHARINGS = ("text", "factors", "materialised")


@pytest.fixture(scope="module")
def deep_clip() -> FrozenCLIP:
    return random_clip(vision_cfg={"layers": 4}, text_cfg={"layers": 5})


def make(clip: FrozenCLIP, name: str = "maple", **options: Any) -> Method:
    cls = method_class(name)
    config = build(cls.Config, {"name": name, **options}, "method")
    return cls(config, clip, Task(CLASS_NAMES))


def twin_logits(clip: FrozenCLIP, leaves: list[Tensor], pixels: Tensor, prefix: str) -> Tensor:
    """Logits (B, C) of one client from `text`, `weight` and `bias`, layer by layer."""
    text, weight, bias = leaves
    visual = []
    for prompt, w, b in zip(text, weight, bias, strict=True):
        linear = torch.nn.Linear(w.shape[1], w.shape[0])
        visual.append(torch.func.functional_call(linear, {"weight": w, "bias": b}, (prompt,)))
    images = twins.plain_images(clip, pixels, visual)
    return clip.model.logit_scale.exp() * images @ twins.plain_text(clip, prefix, list(text)).T


@pytest.mark.parametrize(
    ("options", "prefix"),
    [
        ({"depth": 3}, "a photo of a"),
        ({"depth": 1}, "a photo of a"),
        ({"depth": 2, "context_tokens": 4}, "a photo of a"),
        ({"depth": 9, "context_tokens": 3, "context_init": None}, "X X X"),
    ],
)
@pytest.mark.parametrize("sharing", ["text", "factors"])
def test_logits_loss_and_gradients_are_the_plain_ones(
    deep_clip: FrozenCLIP, sharing: str, options: dict[str, Any], prefix: str
) -> None:
    method = make(deep_clip, sharing=sharing, **options)
    shared, private = (
        twins.moved(method.init_shared(1), K, 1),
        twins.moved(method.init_private(1, 0), K, 2),
    )
    batch = batch_of(
        twins.pictures(deep_clip, K, B), torch.tensor([[0, 1, 2, 3, 3], [5, 4, 0, 0, 1]])
    )
    batch = replace(batch, mask_KB=torch.tensor([[True] * 5, [True] * 3 + [False] * 2]))
    encoded = method.encode(shared, private)
    logits = method.logits(encoded, batch.inputs)
    ce = method.loss_terms(shared, private, encoded, batch)["ce"]
    named = shared | private
    ours = torch.autograd.grad(ce.sum(), list(named.values()))
    for k in range(K):
        leaves = [named[n].detach()[k].clone().requires_grad_() for n in ("text", "weight", "bias")]
        assert batch.inputs.pixels is not None
        expected = twin_logits(deep_clip, leaves, batch.inputs.pixels[k], prefix)
        twins.close(logits[k], expected)
        real = int(batch.mask_KB[k].sum())
        loss = F.cross_entropy(expected[:real], batch.labels_KB[k, :real])
        assert ce[k].item() == pytest.approx(loss.item(), rel=1e-4)
        for name, theirs in zip(
            ("text", "weight", "bias"), torch.autograd.grad(loss, leaves), strict=True
        ):
            twins.close(ours[list(named).index(name)][k], theirs)


def test_starts_are_the_authors(deep_clip: FrozenCLIP) -> None:
    """Of the words the first two are learned; deep projections start as copies of one."""
    method = make(deep_clip, depth=3)
    text = method.init_shared(1)["text"]
    ids = deep_clip.tokenizer(["a photo of a river."])
    assert torch.equal(text[0], deep_clip.model.token_embedding(ids)[0, 1:3])
    assert text[1:].std().item() == pytest.approx(0.02, rel=0.2)
    private = method.init_private(1, 0)
    assert torch.equal(private["weight"][1], private["weight"][2])
    assert not torch.equal(private["weight"][0], private["weight"][1])
    bound = deep_clip.text.width**-0.5
    for tensor in private.values():
        assert 0.9 * bound < tensor.abs().max() <= bound
    assert all(torch.equal(method.init_private(1, 3)[n], t) for n, t in private.items())
    plain = deep_clip.encode_text_raw([f"a photo of a {c}." for c in CLASS_NAMES])
    shallow = make(deep_clip, depth=1)
    start = {n: t[None] for n, t in shallow.init_shared(1).items()}
    twins.close(shallow.encode(start, None)["classes"][0], F.normalize(plain, dim=-1))


@pytest.mark.parametrize(
    ("words", "tokens", "expected"),
    [
        ("a photo of a", 2, ("a photo", "of a")),
        ("a_photo_of_a", 4, ("a photo of a", "")),
        ("a photo of a", 1, ("a", "photo of a")),
    ],
)
def test_words_split_after_the_learned_tokens(
    clip: FrozenCLIP, words: str, tokens: int, expected: tuple[str, str]
) -> None:
    assert split_words(clip, words, tokens) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"context_tokens": 5},
        {"context_init": "orthophotography"},
        {"depth": 0},
        {"sharing": "visual"},
    ],
)
def test_impossible_configs_are_refused(clip: FrozenCLIP, options: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        make(clip, **options)


def test_a_resnet_is_refused_in_one_line() -> None:
    resnet = random_clip(vision_cfg={"layers": [1, 1, 1, 1], "image_size": 64, "width": 8})
    with pytest.raises(UserError, match="ViT"):
        make(resnet)


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ({"sharing": "text"}, 9 * 2 * 512),
        ({"sharing": "factors"}, 9 * (2 * 512 + 512 * 768 + 768)),
        ({"sharing": "materialised"}, 9 * 2 * (512 + 768)),
    ],
)
def test_uploaded_numbers_on_vit_b16(options: dict[str, Any], numbers: int) -> None:
    clip = shape_only_clip("ViT-B-16")
    for tower in (clip.model.visual.transformer, clip.model.transformer):
        if len(tower.resblocks) == 1:  # only the count of layers matters
            tower.resblocks.extend([tower.resblocks[0]] * 11)
    assert uploaded_numbers(make(clip, **options)) == numbers


def test_depth_is_limited_by_the_shorter_tower(deep_clip: FrozenCLIP) -> None:
    assert make(deep_clip, depth=9).init_shared(1)["text"].shape[0] == 4


def test_fedmaple_shares_everything_with_equal_weights(deep_clip: FrozenCLIP) -> None:
    method = make(deep_clip, "fedmaple")
    assert set(method.init_shared(1)) == {"text", "weight", "bias"}
    assert method.init_private(1, 0) == {}
    assert dict(method.config.default_strategy) == {"name": "fedavg", "weights": "uniform"}


def test_the_global_model_of_text_sharing_sees_plain_images(deep_clip: FrozenCLIP) -> None:
    method, inputs = make(deep_clip, depth=3), twins.pictures(deep_clip, 1, B)
    shared = {n: t[None] for n, t in method.init_shared(1).items()}
    encoded = method.encode(shared, None)
    expected = deep_clip.logit_scale * inputs.features[0] @ encoded["classes"][0].T
    twins.close(method.logits(encoded, inputs)[0], expected)
    assert method.class_embeddings(encoded) is not None
    private = stack([method.init_private(1, 0)])
    personal = method.encode(shared, private)
    assert (method.logits(personal, inputs)[0] - expected).abs().max() > 1e-2
    assert method.class_embeddings(personal) is None


# One round of local training

TRAINING = TrainingConfig(lr=0.05, batch_size=4, weight_decay=0.0)


def client_data(clip: FrozenCLIP, client: int) -> ClientData:
    inputs = twins.pictures(clip, 2, 8)[client]
    return ClientData(client, inputs, (torch.arange(8) + client) % 6)


def train(method: Method, shared: Tensors, private: list[Tensors], server_round: int) -> list[Any]:
    data = [client_data(method.clip, c) for c in range(2)]
    return train_clients(
        method,
        [shared] * 2,
        private,
        data,
        TRAINING,
        seed=1,
        server_round=server_round,
        rounds=4,
    )


def product(tensors: Tensors) -> Tensor:
    """F_j(P_j) (J, M, w), one product at a time."""
    triples = zip(tensors["text"], tensors["weight"], tensors["bias"], strict=True)
    return torch.stack([p @ w.T + b for p, w, b in triples])


def mean(results: list[Any]) -> Tensors:
    return {n: (results[0].shared[n] + results[1].shared[n]) / 2 for n in results[0].shared}


@pytest.mark.parametrize("sharing", SHARINGS)
def test_private_projections_differ_after_training_and_never_leave(
    deep_clip: FrozenCLIP, sharing: str
) -> None:
    method = make(deep_clip, sharing=sharing, depth=2)
    shared = method.init_shared(1)
    results = train(method, shared, [method.init_private(1, c) for c in range(2)], 1)
    for result in results:
        assert set(result.shared) == set(shared)
        for name, before in shared.items():
            assert not torch.equal(result.shared[name], before)
    if sharing != "factors":
        assert not torch.equal(results[0].private["weight"], results[1].private["weight"])


def test_the_mean_of_products_is_what_materialised_averages(deep_clip: FrozenCLIP) -> None:
    """In the first round both ways train alike; only then do their averages part."""
    outcomes = {}
    for sharing in ("factors", "materialised"):
        method = make(deep_clip, sharing=sharing, depth=2)
        private = [method.init_private(1, c) for c in range(2)]
        outcomes[sharing] = train(method, method.init_shared(1), private, 1)
    products = []
    for whole, part in zip(outcomes["factors"], outcomes["materialised"], strict=True):
        twins.close(part.shared["text"], whole.shared["text"])
        twins.close(part.private["weight"], whole.shared["weight"])
        twins.close(part.shared["visual"], product(whole.shared))
        products.append(product(whole.shared))
    averaged = mean(outcomes["materialised"])["visual"]
    twins.close(averaged, (products[0] + products[1]) / 2)
    of_factors = product(mean(outcomes["factors"]))
    assert (averaged - of_factors).abs().max() > 1e-4 * averaged.abs().max()


def test_materialised_training_goes_on_from_the_average(deep_clip: FrozenCLIP) -> None:
    """Round 2 starts at the mean visual prompts, though no client's own product gives them."""
    method = make(deep_clip, sharing="materialised", depth=2)
    first = train(method, method.init_shared(1), [method.init_private(1, c) for c in range(2)], 1)
    averaged = mean(first)
    for result in first:
        apart = product(averaged | result.private) - averaged["visual"]
        assert apart.abs().max() > 1e-4
        assert not result.private["training"].any()
    stacked = stack([averaged] * 2), stack([r.private for r in first])
    batch = batch_of(twins.pictures(deep_clip, 2, B), torch.zeros(2, B, dtype=torch.long))
    started = method.start_round(*stacked, batch.round_info)
    twins.close(method.encode(*started)["visual"][1], averaged["visual"])
    # Tested between the rounds, personal models have the average as well, whatever they keep.
    twins.close(method.encode(*stacked)["visual"][1], averaged["visual"])
    twins.close(method.encode(stacked[0], None)["visual"][0], averaged["visual"])
    second = train(method, averaged, [r.private for r in first], 2)
    for before, after in zip(first, second, strict=True):
        own = product(after.shared | after.private) - product(averaged | before.private)
        twins.close(after.shared["visual"] - averaged["visual"], own, rtol=1e-3)


def test_materialised_gradients_within_a_round_are_the_factors(deep_clip: FrozenCLIP) -> None:
    """With a zero offset, P and F get the gradients that `factors` gives them."""
    whole = make(deep_clip, sharing="factors", depth=2)
    part = make(deep_clip, sharing="materialised", depth=2)
    batch = batch_of(twins.pictures(deep_clip, 1, B), torch.tensor([[0, 1, 2, 3, 4]]))
    shared = twins.moved(whole.init_shared(1), 1, 5)
    loss_terms = whole.loss_terms(shared, {}, whole.encode(shared, {}), batch)
    theirs = torch.autograd.grad(loss_terms["ce"].sum(), list(shared.values()))
    text = {"text": shared["text"], "visual": product({n: t[0] for n, t in shared.items()})[None]}
    private = stack([part.init_private(1, 0)]) | {n: shared[n] for n in ("weight", "bias")}
    begun = part.start_round(
        {n: t.detach() for n, t in text.items()},
        {n: t.detach() for n, t in private.items()},
        batch.round_info,
    )
    leaves = [begun[0]["text"], begun[1]["weight"], begun[1]["bias"]]
    for leaf in leaves:
        leaf.requires_grad_()
    ours = torch.autograd.grad(
        part.loss_terms(*begun, part.encode(*begun), batch)["ce"].sum(), leaves
    )
    for a, b in zip(ours, theirs, strict=True):
        twins.close(a, b)
