"""Plain twins for the tests of methods: the paper's formula on one client, with loops.

The twins use open_clip's own modules on all 77 text positions and all patches, and none of the
library's towers. What several tests compare with them is also built here: methods, batches, and
tensors that differ between clients. Shape suffixes are those of `fedprompt.methods.base`; also J
layers with prompts, M tokens, d text width, w width of the image tower, P patches, L positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.layer_statistics import StatisticsEncoder
from fedprompt.config.fields import build as build_config
from fedprompt.config.schema import TrainingConfig
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import Batch, ClientData, Method, Task, Tensors, stack
from fedprompt.methods.registry import method_class
from fedprompt.rng import generator
from fedprompt.training import train_clients
from tests.support.builders import CLASS_NAMES, batch_of

TASK = Task(CLASS_NAMES)
K, B, P = 3, 5, 4
"""Clients, images and patches of `batch`."""
REAL = (5, 3, 4)
"""Images of each client of `batch`; the rest is padding."""
LABELS = ((0, 1, 5, 1, 3), (2, 4, 2, 0, 0), (3, 3, 1, 5, 2))
START, END = 49406, 49407
"""Token ids of the start and the end of a text."""


def build(clip: FrozenCLIP, name: str, task: Task = TASK, **options: Any) -> Method:
    """The method called `name` with some of its config keys set."""
    cls = method_class(name)
    return cls(build_config(cls.Config, {"name": name, **options}, "method"), clip, task)


def close(ours: Tensor, theirs: Tensor, what: str = "", rtol: float = 1e-4) -> None:
    """Assert that the largest difference is at most `rtol` of the largest value, which is not 0."""
    assert ours.shape == theirs.shape, what
    largest = float(theirs.detach().abs().max())
    assert largest > 0, f"{what}: nothing to compare"
    difference = float((ours - theirs).detach().abs().max())
    assert difference <= rtol * largest, f"{what}: {difference} of {largest}"


# Batches and tensors


def batch(
    clip: FrozenCLIP,
    *,
    patches: bool = False,
    local: bool = False,
    statistics: bool = False,
    step: int = 0,
    server_round: int = 1,
) -> Batch:
    """Images of K clients; the padding repeats other images and labels, not zeros."""
    draws = generator(0, "twins")

    def vectors(*shape: int) -> Tensor:
        drawn = torch.from_numpy(draws.standard_normal((*shape, clip.embed_dim))).float()
        return F.normalize(drawn, dim=-1)

    mask = torch.arange(B)[None] < torch.tensor(REAL)[:, None]
    inputs = Inputs(
        vectors(K, B),
        vectors(K, B, P) if patches else None,
        local=vectors(K, B, P) if local else None,
        statistics=style_statistics(clip, K, B) if statistics else None,
    )
    return batch_of(inputs, torch.tensor(LABELS), mask, step=step, server_round=server_round)


def style_statistics(clip: FrozenCLIP, *shape: int, seed: int = 0) -> Tensor:
    """Means and positive standard deviations (..., L, 2, w) of the layers of the image tower."""
    layers, kinds, width = StatisticsEncoder(clip).shape
    drawn = draw(*shape, layers, kinds, width, seed=seed)
    return torch.stack([drawn[..., 0, :], drawn[..., 1, :].abs()], dim=-2)


def one_client(data: Batch, k: int) -> Batch:
    """Client k's images alone, without padding."""
    rows = (slice(k, k + 1), slice(0, REAL[k]))
    second, statistics = data.second_KBD, data.second_statistics
    return replace(
        data,
        inputs=data.inputs[rows],
        labels_KB=data.labels_KB[rows],
        mask_KB=data.mask_KB[rows],
        step=0,
        second_KBD=None if second is None else second[rows],
        second_statistics=None if statistics is None else statistics[rows],
    )


def images_of(data: Batch, k: int) -> tuple[Tensor, Tensor]:
    """Client k's images without padding: features (n, D) and labels (n,)."""
    real = data.mask_KB[k]
    return data.inputs.features[k][real], data.labels_KB[k][real]


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Normal draws of a fixed seed."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).float()


def features(clients: int, images: int, width: int, seed: int = 0) -> Tensor:
    """L2-normalised features (K, B, D) without any structure."""
    return F.normalize(draw(clients, images, width, seed=seed), dim=-1)


def pictures(clip: FrozenCLIP, clients: int, images: int) -> Inputs:
    """Random pictures (K, B, 3, H, W) with their frozen features."""
    size = clip.model.visual.image_size
    noise = torch.Generator().manual_seed(3)
    pixels = torch.randn(clients, images, 3, *size, generator=noise)
    encoded = clip.encode_images(pixels.flatten(0, 1)).unflatten(0, (clients, images))
    return Inputs(F.normalize(encoded, dim=-1), pixels=pixels)


def moved(start: Tensors, clients: int, seed: int, by: float = 0.05) -> Tensors:
    """Leaves (K, ...) that differ between clients, from tensors without a client axis."""
    noise = torch.Generator().manual_seed(seed)
    return {
        n: (t + by * torch.randn(clients, *t.shape, generator=noise)).requires_grad_()
        for n, t in start.items()
    }


def tensors(method: Method, noise: float = 0.05, clients: int = K) -> tuple[Tensors, Tensors]:
    """Shared and private tensors that differ between clients; leaves, except for frozen ones."""
    both = (
        stack([method.init_shared(1)] * clients),
        stack([method.init_private(1, k) for k in range(clients)]),
    )
    for kind, container in zip(("shared", "private"), both, strict=True):
        for i, (n, value) in enumerate(container.items()):
            if f"{kind}.{n}" not in method.frozen:
                by = noise * draw(*value.shape, seed=100 * len(kind) + i)
                container[n] = (value + by).requires_grad_()
    return both


def row(held: Tensors, k: int) -> Tensors:
    """Client k's tensors as a block of one client, leaves of their own."""
    return {
        n: t.detach()[k : k + 1].clone().requires_grad_(t.requires_grad) for n, t in held.items()
    }


# Losses and gradients


def loss_of(method: Method, shared: Tensors, private: Tensors, data: Batch) -> dict[str, Tensor]:
    """The method's own loss terms."""
    return method.loss_terms(shared, private, method.encode(shared, private), data)


def leaves(*containers: Tensors) -> list[Tensor]:
    """The tensors that take gradients."""
    return [t for tensors in containers for t in tensors.values() if t.requires_grad]


def gradients(loss_terms: dict[str, Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Plain gradients of the sum of all terms and clients."""
    return list(torch.autograd.grad(torch.stack(list(loss_terms.values())).sum(), inputs))


def applied_gradients(method: Method, shared: Tensors, data: Batch) -> dict[str, Tensor]:
    """What the optimiser would be given, by name of the shared tensor."""
    leaf_of = {f"shared.{n}": t for n, t in shared.items() if t.requires_grad}
    found = method.gradients(loss_of(method, shared, {}, data), leaf_of, data)
    return {n.removeprefix("shared."): g for n, g in found.items() if g is not None}


def assert_clients_alone_agree(
    method: Method, shared: Tensors, private: Tensors, data: Batch
) -> None:
    """K clients together, padded, have the terms and gradients of each alone, unpadded."""
    together = loss_of(method, shared, private, data)
    found = gradients(together, leaves(shared, private))
    for k in range(K):
        s, p = row(shared, k), row(private, k)
        alone = loss_of(method, s, p, one_client(data, k))
        assert alone.keys() == together.keys()
        for term, value in alone.items():
            torch.testing.assert_close(together[term][k], value[0], rtol=1e-4, atol=1e-6)
        for ours, theirs in zip(found, gradients(alone, leaves(s, p)), strict=True):
            close(ours[k], theirs[0])


# Prompts


def cross_attended(shared_Md: Tensor, private_Nd: Tensor) -> Tensor:
    """S + softmax(S P^T / sqrt(d)) P (M, d) of one client, token by token."""
    rows = []
    for token in shared_Md:
        weights = torch.stack([(token @ p / token.numel() ** 0.5).exp() for p in private_Nd])
        added = [w * p for w, p in zip(weights / weights.sum(), private_Nd, strict=True)]
        rows.append(token + torch.stack(added).sum(0))
    return torch.stack(rows)


# CLIP's towers


def text_pass(clip: FrozenCLIP, embedded_CLd: Tensor, ids_CL: Tensor) -> Tensor:
    """L2-normalised features (C, D) of token embeddings, over all 77 positions."""
    model: Any = clip.model
    x = embedded_CLd + model.positional_embedding
    x = model.transformer(x, attn_mask=model.attn_mask)
    x = model.ln_final(x)[torch.arange(len(ids_CL)), ids_CL.argmax(dim=-1)]
    return F.normalize(x @ model.text_projection, dim=-1)


def text_feature(clip: FrozenCLIP, context_Md: Tensor, name: str, position: str = "end") -> Tensor:
    """The normalised feature (D,) of `[SOS][context][name].` in one of CoOp's three orders."""
    model: Any = clip.model
    ids = clip.tokenizer([name])[0].tolist()
    name_ids = ids[1 : ids.index(END)] if name else []
    half = {"end": len(context_Md), "middle": len(context_Md) // 2, "front": 0}[position]
    stop = clip.tokenizer(["."])[0, 1].item()
    zeros = 77 - 3 - len(context_Md) - len(name_ids)
    after = [stop, END, *[0] * zeros]

    def embed(tokens: list[int]) -> Tensor:
        return model.token_embedding(torch.tensor(tokens, dtype=torch.long))

    parts = [embed([START]), context_Md[:half], embed(name_ids), context_Md[half:], embed(after)]
    x = (torch.cat(parts) + model.positional_embedding)[None]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask))
    return F.normalize(x[0, 2 + len(context_Md) + len(name_ids)] @ model.text_projection, dim=-1)


def class_features(clip: FrozenCLIP, context_Md: Tensor, position: str = "end") -> Tensor:
    """Features (C, D) of all class names with one context."""
    return torch.stack([text_feature(clip, context_Md, name, position) for name in CLASS_NAMES])


def template_features(clip: FrozenCLIP, template: str = "a photo of a {}.") -> Tensor:
    """open_clip's own features (C, D) of a hand-written template."""
    model: Any = clip.model
    with torch.no_grad():
        texts = clip.tokenizer([template.format(name) for name in CLASS_NAMES])
        return F.normalize(model.encode_text(texts), dim=-1)


def plain_text(
    clip: FrozenCLIP, prefix: str, prompts_JMd: list[Tensor], *, raw: bool = False
) -> Tensor:
    """Features (C, D) under deep prompts, as the public MaPLe and PromptSRC code computes them.

    With `raw` they are not normalised. Tokens 1 .. M of "{prefix} {class}." are replaced, and so
    are the hidden states that the layer before has left for them.
    """
    model, tokens = clip.model, prompts_JMd[0].shape[0]
    rows = []
    for name in CLASS_NAMES:
        ids = clip.tokenizer([f"{prefix} {name}."])
        x = model.token_embedding(ids)
        x = torch.cat([x[:, :1], prompts_JMd[0][None], x[:, 1 + tokens :]], dim=1)
        x = x + model.positional_embedding
        for layer, block in enumerate(model.transformer.resblocks):
            if 0 < layer < len(prompts_JMd):
                x = torch.cat([x[:, :1], prompts_JMd[layer][None], x[:, 1 + tokens :]], dim=1)
            x = block(x, attn_mask=model.attn_mask)
        x = model.ln_final(x)[0, int(ids.argmax())] @ model.text_projection
        rows.append(x if raw else x / x.norm())
    return torch.stack(rows)


def plain_images(
    clip: FrozenCLIP, pixels_B3HW: Tensor, prompts_JMw: list[Tensor], *, raw: bool = False
) -> Tensor:
    """Features (B, D), or un-normalised ones if `raw`, under deep visual prompts, if any."""
    visual = clip.model.visual
    rows = []
    for image in pixels_B3HW:
        patches = visual.conv1(image[None]).flatten(2).transpose(1, 2)
        x = torch.cat([visual.class_embedding[None, None], patches], dim=1)
        x = x + visual.positional_embedding
        seen = x.shape[1]
        if prompts_JMw:
            x = torch.cat([x, prompts_JMw[0][None]], dim=1)
        x = visual.ln_pre(x)
        for layer, block in enumerate(visual.transformer.resblocks):
            if 0 < layer < len(prompts_JMw):
                x = torch.cat([x[:, :seen], prompts_JMw[layer][None]], dim=1)
            x = block(x)
        x = visual.ln_post(x[0, 0]) @ visual.proj
        rows.append(x if raw else x / x.norm())
    return torch.stack(rows)


# Federated training, one client and one step after the other

SEED, ROUNDS = 3, 4
SIZES = (7, 5, 6)
"""Training images of the clients."""
Step = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Prompt, features and labels -> the gradient that moves the prompt."""


def clients(clip: FrozenCLIP) -> list[ClientData]:
    """Three clients with different classes and numbers of images."""
    data = []
    for k, size in enumerate(SIZES):
        draws = generator(0, "wrapper twin", k)
        vectors = torch.from_numpy(draws.standard_normal((size, clip.embed_dim))).float()
        labels = torch.from_numpy(draws.integers(k, k + 3, size) % len(CLASS_NAMES))
        data.append(ClientData(k, Inputs(F.normalize(vectors, dim=-1)), labels))
    return data


def config(**options: Any) -> TrainingConfig:
    """Two epochs of batches of three, at a rate that moves prompts far."""
    defaults = {"lr": 0.05, "schedule": "constant", "local_epochs": 2, "batch_size": 3}
    return TrainingConfig(**{**defaults, **options})


def batches(data: ClientData, training: TrainingConfig, server_round: int) -> list[list[int]]:
    """Rows of the client's images, step by step."""
    steps = []
    for epoch in range(training.local_epochs):
        key = ("shuffle", server_round, data.client, epoch)
        order = generator(SEED, *key).permutation(len(data)).tolist()
        size = training.batch_size
        steps += [order[i : i + size] for i in range(0, len(order), size)]
    return steps


def local_sgd(
    data: ClientData, training: TrainingConfig, server_round: int, start: Tensor, step: Step
) -> Tensor:
    """The prompt after the client's steps in a round, from `start`."""
    prompt, velocity = start.clone(), torch.zeros_like(start)
    for rows in batches(data, training, server_round):
        gradient = step(prompt, data.inputs.features[rows], data.labels_N[rows])
        gradient = gradient + training.weight_decay * prompt
        velocity = training.momentum * velocity + gradient
        prompt = prompt - training.lr * velocity
    return prompt


def ce_gradient(clip: FrozenCLIP, prompt: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    """Gradient of CoOp's cross-entropy with respect to the prompt (M, d)."""
    leaf = prompt.detach().clone().requires_grad_()
    logits = clip.logit_scale * features @ class_features(clip, leaf).T
    return torch.autograd.grad(F.cross_entropy(logits, labels), leaf)[0]


def train(
    method: Method,
    received: list[Tensors],
    private: list[Tensors],
    data: list[ClientData],
    training: TrainingConfig,
    server_round: int,
) -> list[Any]:
    """The library's own local training of some clients together."""
    return train_clients(
        method,
        received,
        private,
        data,
        training,
        seed=SEED,
        server_round=server_round,
        rounds=ROUNDS,
    )


def near(ours: Tensor, theirs: Tensor, start: Tensor) -> None:
    """Equal up to 1e-4 of how far `theirs` has moved from `start`."""
    moved = float((theirs - start).abs().max())
    assert moved > 1e-3, "nothing moved"
    assert float((ours - theirs).abs().max()) <= 1e-4 * moved
