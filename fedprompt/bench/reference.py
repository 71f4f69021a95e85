"""Slow, plain counterparts of the fast paths, for tests and benchmarks.

`reference_class_features` is the counterpart of the text tower. The rest is a federation of CoOp as
public code runs it: every image passes through the image tower at every step and evaluation, the
class prompts through all positions of the text tower, each client has a copy of the whole model,
and one client trains at a time. The mathematics and the order of images are those of our own path,
so that the results must agree.

Shape suffixes: C classes, L text positions, M context tokens, R = L - 1 - M positions after the
context, d text width, B images of a batch, D joint embedding.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import text_global_pool
from torch import Tensor, nn

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.text_tower import TextTower
from fedprompt.config.schema import TrainingConfig
from fedprompt.rng import generator
from fedprompt.scoring import Score


def reference_class_features(
    tower: TextTower, context: Tensor, deep: Tensor | None = None
) -> Tensor:
    """What `tower(context, deep)` computes, over all positions and one prompt at a time.

    This is the pass of CoOp's public code: every class's full sequence of (usually 77) positions
    passes through the model's own blocks, and open_clip's pooling extracts the feature.

    Args:
        tower: class list, context length and class position.
        context: as in `TextTower.__call__`.
        deep: as in `TextTower.__call__`.

    Returns:
        (..., C, D), not normalised.
    """
    parts = tower.clip.text
    tail = 3 if tower.class_specific else 2
    lead = context.shape[:-tail]
    classes = torch.arange(len(tower.class_names), device=tower.clip.device)
    length = tower.token_ids_CL.shape[1]
    features = []
    flat_deep = None if deep is None else deep.reshape(-1, *deep.shape[-3:])
    for i, prompt in enumerate(context.reshape(-1, *context.shape[-tail:])):
        embedded_1CLd, slots_CM = tower.assemble(prompt[None], classes, length)
        x = embedded_1CLd[0]
        mask = parts.attn_mask_LL
        for layer, block in enumerate(parts.blocks):
            if flat_deep is not None and 0 < layer <= flat_deep.shape[1]:
                x = x.clone()  # autograd needs the block's output unchanged
                for c in classes.tolist():
                    # Fewer tokens than the context has replace the first ones.
                    x[c, slots_CM[c, : flat_deep.shape[2]]] = flat_deep[i, layer - 1]
            x = block(x, attn_mask=mask)
        x = parts.ln_final(x)
        pooled = text_global_pool(
            x, tower.token_ids_CL.to(x.device), parts.pool_type, eos_token_id=parts.eos_id
        )
        features.append(parts.project(pooled))
    return torch.stack(features).reshape(*lead, *features[0].shape)


class ReferenceCoOp(nn.Module):
    """CoOp's model as public federated code builds it: images in, logits out, nothing cached.

    The whole CLIP is inside, so a copy of a client's model copies its weights too. Only the
    context (M, d) is trained. Every call encodes its images, and the prompts of all classes over
    all positions of the text tower.

    Source: the structure of CoOp's `CustomCLIP` (Zhou et al., IJCV 2022), class name at the end.

    Args:
        clip: the frozen backbone.
        class_names: C names.
        context_Md: the initial context.
    """

    ids_CL: Tensor
    before_C1d: Tensor
    after_CRd: Tensor

    def __init__(self, clip: FrozenCLIP, class_names: Sequence[str], context_Md: Tensor) -> None:
        super().__init__()
        self.model = clip.model
        self.logit_scale = clip.logit_scale
        self.context = nn.Parameter(context_Md.to(clip.device, copy=True))
        tokens = len(context_Md)
        # Placeholders of one token each, whose embeddings the context replaces, as in CoOp.
        lead = " ".join(["X"] * tokens)
        ids_CL = clip.tokenizer([f"{lead} {name}." for name in class_names]).to(clip.device)
        embedded_CLd = clip.text.token_embedding(ids_CL)
        # Buffers, so that they are copied with the model.
        self.register_buffer("ids_CL", ids_CL)
        self.register_buffer("before_C1d", embedded_CLd[:, :1].clone())
        self.register_buffer("after_CRd", embedded_CLd[:, 1 + tokens :].clone())

    def class_features(self) -> Tensor:
        """L2-normalised features (C, D) of all class prompts."""
        text: Any = getattr(self.model, "text", self.model)
        context_CMd = self.context.expand(len(self.ids_CL), -1, -1)
        x = torch.cat([self.before_C1d, context_CMd, self.after_CRd], dim=1)
        x = text.transformer(x + text.positional_embedding, attn_mask=text.attn_mask)
        # The end-of-text token has the largest id, as in OpenAI's CLIP.
        end_C = self.ids_CL.argmax(dim=-1)
        pooled_Cd = text.ln_final(x)[torch.arange(len(x), device=x.device), end_C]
        return F.normalize(pooled_Cd @ text.text_projection, dim=-1)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Logits (B, C)."""
        with torch.no_grad():
            # The image tower is frozen, so only the text tower needs a graph.
            images_B3HW = images_B3HW.to(self.context.device)
            images_BD = F.normalize(self.model.encode_image(images_B3HW), dim=-1)
        return self.logit_scale * images_BD @ self.class_features().T


@dataclass(frozen=True)
class ReferenceClient:
    """A client's preprocessed images (n, 3, H, W) and labels (n,), for training and for testing."""

    client: int
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def reference_local_training(
    model: ReferenceCoOp,
    client: ReferenceClient,
    config: TrainingConfig,
    *,
    seed: int,
    server_round: int,
    rounds: int,
) -> float:
    """Train `model` in place on one client's images, with one of PyTorch's optimisers.

    The order of images is that of `training.train_clients`.

    Args:
        model: its context is changed.
        client: the images.
        config: optimiser, learning rate, schedule, epochs and batch size.
        seed: of the run.
        server_round: from 1.
        rounds: number of rounds of the run, for the schedule.

    Returns:
        The mean loss over all images seen.
    """
    lr = config.lr
    if config.schedule == "cosine":
        # Round 1 trains at the full rate; the schedule runs over rounds, not over local steps.
        lr *= 0.5 * (1 + math.cos(math.pi * (server_round - 1) / rounds))
    optimizer: torch.optim.Optimizer
    if config.optimizer == "adamw":
        optimizer = torch.optim.AdamW([model.context], lr=lr, weight_decay=config.weight_decay)
    else:
        optimizer = torch.optim.SGD(
            [model.context], lr=lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
    count, total = len(client.train_labels), 0.0
    for epoch in range(config.local_epochs):
        order = generator(seed, "shuffle", server_round, client.client, epoch).permutation(count)
        for first in range(0, count, config.batch_size):
            rows = torch.from_numpy(order[first : first + config.batch_size])
            targets = client.train_labels[rows].to(model.context.device)
            loss = F.cross_entropy(model(client.train_images[rows]), targets)
            optimizer.zero_grad()
            loss.backward()
            if config.clip_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_([model.context], config.clip_grad_norm)
            optimizer.step()
            # Weighted by images, because the last batch of an epoch may be smaller.
            total += loss.item() * len(rows)
    return total / (count * config.local_epochs)


@torch.no_grad()
def reference_evaluate(
    model: ReferenceCoOp, images: Tensor, labels: Tensor, batch_size: int
) -> Score:
    """Score on a test set. Images and class prompts are encoded again for every batch.

    Args:
        model: the model.
        images: (n, 3, H, W), preprocessed.
        labels: (n,).
        batch_size: images of a batch.

    Returns:
        Correct answers, tested images and the sum of losses.
    """
    correct, loss = 0, 0.0
    for first in range(0, len(labels), batch_size):
        targets = labels[first : first + batch_size].to(model.context.device)
        logits = model(images[first : first + batch_size])
        correct += int((logits.argmax(-1) == targets).sum())
        loss += float(F.cross_entropy(logits, targets, reduction="sum"))
    return Score(correct, len(labels), loss)


@dataclass(frozen=True)
class ReferenceRound:
    """The outcome of a round: the averaged context, the clients' mean losses, and scores."""

    context: Tensor
    losses: list[float]
    global_score: Score
    personal_scores: list[Score]


def reference_federation(
    model: ReferenceCoOp,
    clients: Sequence[ReferenceClient],
    server_test: tuple[Tensor, Tensor],
    config: TrainingConfig,
    *,
    seed: int,
    rounds: int,
    test_batch: int,
) -> Iterator[ReferenceRound]:
    """Run FedAvg on the context, and evaluate in every round.

    Every client of every round trains a deep copy of the whole model. The average is weighted by
    the clients' numbers of training images.

    Args:
        model: its context is changed.
        clients: all of them take part in every round.
        server_test: images (n, 3, H, W) and labels (n,) of the server.
        config: local training.
        seed: of the run.
        rounds: number of rounds.
        test_batch: images of a test batch.

    Yields:
        Rounds 0 (nothing trained yet) to `rounds`.
    """
    for server_round in range(rounds + 1):
        losses = []
        if server_round > 0:
            contexts = []
            for client in clients:
                # As public code does: one copy of the whole CLIP per client and round.
                local = copy.deepcopy(model)
                losses.append(
                    reference_local_training(
                        local, client, config, seed=seed, server_round=server_round, rounds=rounds
                    )
                )
                contexts.append(local.context.detach())
            weights = torch.tensor([float(len(c.train_labels)) for c in clients])
            mean = torch.einsum(
                "k,kmd->md", (weights / weights.sum()).to(contexts[0]), torch.stack(contexts)
            )
            with torch.no_grad():
                model.context.copy_(mean)
        yield ReferenceRound(
            model.context.detach().clone(),
            losses,
            reference_evaluate(model, *server_test, test_batch),
            [reference_evaluate(model, c.test_images, c.test_labels, test_batch) for c in clients],
        )
