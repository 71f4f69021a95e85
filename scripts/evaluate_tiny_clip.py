"""Accuracy of the embedded tiny CLIP on aerial scenes: zero-shot, CoOp and linear probe.

    python scripts/evaluate_tiny_clip.py

Test images have indices that neither pre-training nor the shots use. Accuracies are in percent.
Shape suffixes: N images, C classes, D joint embedding, d text width, L text positions, p context,
P patches.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from open_clip.model import CLIP
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.patch_features import dense_encoder
from fedprompt.backbone.tiny import tiny_model_config, tiny_state_dict
from fedprompt.data import aerial_scenes as scenes
from fedprompt.rng import generator, normal

TEMPLATES = ("a photo of a {}.", "a satellite image of a {}.", "an aerial photo of a {}.", "{}")
SHOTS = 16
UNSEEN_FROM = 10_000  # pre-training and shots use smaller indices
TOKENIZE = open_clip.SimpleTokenizer()


@dataclass(frozen=True)
class Features:
    """Normalised image features with labels, domains and indices within class and domain."""

    image_ND: Tensor
    labels_N: Tensor
    domains_N: Tensor
    index_N: Tensor

    def where(self, keep_N: Tensor) -> Features:
        """The images that `keep_N` selects."""
        return Features(
            self.image_ND[keep_N],
            self.labels_N[keep_N],
            self.domains_N[keep_N],
            self.index_N[keep_N],
        )


def to_input(images_N: NDArray[np.uint8]) -> Tensor:
    """uint8 (N, 64, 64, 3) as the network sees it: (N, 3, 64, 64), normalised."""
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN)
    std = torch.tensor(open_clip.OPENAI_DATASET_STD)
    scaled = torch.from_numpy(images_N).float() / 255.0
    return ((scaled - mean) / std).permute(0, 3, 1, 2).contiguous()


def text_features(model: CLIP, embedded_BLd: Tensor, end_B: Tensor) -> Tensor:
    """Normalised text features of embedded texts.

    Args:
        model: a CLIP with a causal text tower.
        embedded_BLd: token embeddings without positions.
        end_B: position of each end-of-text token; later positions are not computed.

    Returns:
        (B, D).
    """
    length = int(end_B.max()) + 1
    x = embedded_BLd[:, :length] + model.positional_embedding[:length]
    x = model.transformer(x, attn_mask=model.attn_mask[:length, :length])
    x = model.ln_final(x)[torch.arange(len(end_B)), end_B]
    return F.normalize(x @ model.text_projection, dim=-1)


def encode_text(model: CLIP, tokens_BL: Tensor) -> Tensor:
    """The normalised result of open_clip's `encode_text`, without computing the padding."""
    return text_features(model, model.token_embedding(tokens_BL), tokens_BL.argmax(1))


@dataclass(frozen=True)
class Drawn:
    """Freshly rendered images, uint8 (N, 64, 64, 3), and (N, 3): class, domain, index."""

    images_N: NDArray[np.uint8]
    table_N3: Tensor

    def batches(self) -> Iterator[Tensor]:
        """The images as the network sees them, in order."""
        for i in range(0, len(self.images_N), 256):
            yield to_input(self.images_N[i : i + 256])


def draw(classes: tuple[str, ...], domains: tuple[str, ...], indices: range) -> Drawn:
    """Render all classes in all domains; labels are positions in `classes`."""
    keys = [(c, d, i) for c in range(len(classes)) for d in range(len(domains)) for i in indices]
    images_N = np.stack([scenes.render(classes[c], domains[d], i) for c, d, i in keys])
    return Drawn(images_N, torch.tensor(keys))


@torch.no_grad()
def encode_scenes(model: CLIP, drawn: Drawn) -> Features:
    """Features of whole images."""
    parts = [model.encode_image(batch, normalize=True) for batch in drawn.batches()]
    return Features(torch.cat(parts), *drawn.table_N3.unbind(1))


@torch.no_grad()
def zero_shot(model: CLIP, features: Features, names: tuple[str, ...], template: str) -> Tensor:
    """Predicted label of every image for one template."""
    text_CD = encode_text(model, TOKENIZE([template.format(name) for name in names]))
    return (features.image_ND @ text_CD.T).argmax(1)


def accuracy(predicted_N: Tensor, labels_N: Tensor) -> float:
    """Share of correct predictions, in percent with one decimal."""
    return round(100.0 * (predicted_N == labels_N).float().mean().item(), 1)


@torch.no_grad()
def one_patch(model: CLIP, drawn: Drawn, names: tuple[str, ...]) -> float:
    """Accuracy of single patches as PLOT and FedOTP read them, over all patches and images."""
    encoder = dense_encoder(FrozenCLIP(model, TOKENIZE, name="tiny", weights_hash=""))
    assert encoder is not None
    encode, _ = encoder
    text_CD = encode_text(model, TOKENIZE([TEMPLATES[0].format(name) for name in names]))
    predicted_NP = torch.cat([(encode(b) @ text_CD.T).argmax(-1) for b in drawn.batches()])
    return accuracy(predicted_NP, drawn.table_N3[:, :1])


def prompted_text(model: CLIP, context_pd: Tensor, names: tuple[str, ...]) -> Tensor:
    """Class features (C, D) of "[context] name." with learned context vectors (CoOp)."""
    filler = " ".join("x" for _ in range(len(context_pd)))
    tokens = TOKENIZE([f"{filler} {name}." for name in names])
    embedded = model.token_embedding(tokens)
    context = context_pd.expand(len(names), -1, -1)
    embedded = torch.cat([embedded[:, :1], context, embedded[:, 1 + len(context_pd) :]], dim=1)
    return text_features(model, embedded, tokens.argmax(1))


def coop(
    model: CLIP,
    shots: Features,
    names: tuple[str, ...],
    lr: float,
    steps: int,
    length: int = 4,
    seed: int = 0,
) -> Tensor:
    """Learn a context with CoOp: batches of 32, SGD with momentum 0.9, cosine schedule.

    K. Zhou, J. Yang, C. C. Loy, Z. Liu. Learning to prompt for vision-language models. IJCV 2022.

    Args:
        model: the frozen CLIP.
        shots: training images.
        names: class names, in the order of the labels.
        lr: initial learning rate.
        steps: number of batches.
        length: number of context tokens.
        seed: of initial context and batches.

    Returns:
        (length, d).
    """
    width = model.positional_embedding.shape[1]
    context = normal((length, width), 0.02, seed, "coop").requires_grad_()
    optimizer = torch.optim.SGD([context], lr=lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    scale = model.logit_scale.exp()
    for step in range(steps):
        rows = torch.from_numpy(generator(seed, "coop", step).choice(len(shots.labels_N), 32))
        text_CD = prompted_text(model, context, names)
        loss = F.cross_entropy(scale * shots.image_ND[rows] @ text_CD.T, shots.labels_N[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return context.detach()


@torch.no_grad()
def with_prompt(
    model: CLIP, features: Features, context_pd: Tensor, names: tuple[str, ...]
) -> float:
    """Accuracy in percent of a learned context."""
    text_CD = prompted_text(model, context_pd, names)
    return accuracy((features.image_ND @ text_CD.T).argmax(1), features.labels_N)


def linear_probe(shots: Features, test: Features, classes: int) -> float:
    """Accuracy of multinomial logistic regression on the frozen image features, an upper bound."""
    weight = torch.zeros(classes, shots.image_ND.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = 10.0 * shots.image_ND @ weight.T + bias
        loss = F.cross_entropy(logits, shots.labels_N) + 1e-4 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return accuracy((10.0 * test.image_ND @ weight.T + bias).argmax(1).detach(), test.labels_N)


def evaluate(model: CLIP, images: int = 15) -> dict[str, float]:
    """All accuracies in percent, by description; `images` test images per class and domain."""
    names = scenes.CLASSES
    unseen = range(UNSEEN_FROM, UNSEEN_FROM + images)
    near = encode_scenes(model, draw(names, scenes.PRETRAINING_DOMAINS, range(UNSEEN_FROM, 10_008)))
    drawn = draw(names, scenes.FEDERATED_DOMAINS, unseen)
    test = encode_scenes(model, drawn)
    shots = encode_scenes(model, draw(names, scenes.FEDERATED_DOMAINS, range(SHOTS)))
    pooled = shots.where(shots.index_N % len(scenes.FEDERATED_DOMAINS) == shots.domains_N)
    result = {"logit scale": round(float(model.logit_scale.exp()), 1)}
    result |= _zero_shot_table(model, "pre-training", near)
    result |= _zero_shot_table(model, "federated", test)
    result["zero-shot, federated, one patch alone"] = one_patch(model, drawn, names)
    for lr, steps in ((0.002, 40), (0.01, 40), (0.05, 40), (0.002, 200), (0.01, 200), (0.05, 200)):
        context = coop(model, pooled, names, lr, steps)
        key = f"CoOp {SHOTS} shots, federated, lr {lr}, {steps} steps"
        result[key] = with_prompt(model, test, context, names)
    for d, domain in enumerate(scenes.FEDERATED_DOMAINS):
        local, here = shots.where(shots.domains_N == d), test.where(test.domains_N == d)
        predicted = zero_shot(model, here, names, TEMPLATES[0])
        result[f"{domain}: zero-shot"] = accuracy(predicted, here.labels_N)
        context = coop(model, local, names, 0.01, 200)
        key = f"{domain}: CoOp {SHOTS} shots of this domain"
        result[key] = with_prompt(model, here, context, names)
        key = f"{domain}: linear probe {SHOTS} shots of this domain"
        result[key] = linear_probe(local, here, len(names))
    result[f"linear probe {SHOTS} shots, federated"] = linear_probe(pooled, test, len(names))
    result[f"linear probe {4 * SHOTS} shots, federated"] = linear_probe(shots, test, len(names))
    predicted = zero_shot(model, test, names, TEMPLATES[0])
    for c, name in enumerate(names):
        here_N = test.labels_N == c
        result[f"zero-shot, federated, {name}"] = accuracy(predicted[here_N], test.labels_N[here_N])
    return result


def _zero_shot_table(model: CLIP, place: str, features: Features) -> dict[str, float]:
    names, table = scenes.CLASSES, {}
    held = torch.tensor([names.index(name) for name in scenes.HELD_OUT_CLASSES])
    is_held = torch.isin(features.labels_N, held)
    unseen = features.where(is_held)
    for template in TEMPLATES:
        key = f"zero-shot '{template}', {place} domains"
        for kind, part in (
            ("all classes", features),
            ("seen classes", features.where(~is_held)),
            ("held-out classes", unseen),
        ):
            predicted = zero_shot(model, part, names, template)
            table[f"{key}, {kind}"] = accuracy(predicted, part.labels_N)
        # Predictions are positions among the held-out classes.
        among = held[zero_shot(model, unseen, scenes.HELD_OUT_CLASSES, template)]
        table[f"{key}, held-out among themselves"] = accuracy(among, unseen.labels_N)
    return table


def main() -> None:
    """Print the accuracies of the committed weights."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=15, help="test images per class and domain")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = CLIP(**tiny_model_config())
    model.load_state_dict(tiny_state_dict(), strict=True)
    for name, value in evaluate(model.eval().requires_grad_(False), args.images).items():
        print(f"{value:7.1f}  {name}")


if __name__ == "__main__":
    main()
