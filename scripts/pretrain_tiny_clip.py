"""Train the embedded tiny CLIP on captioned aerial scenes, and write its weights.

    python scripts/pretrain_tiny_clip.py --out fedprompt/backbone/assets

It takes about a quarter of an hour on one core, without a GPU or a download. Images come from the
pre-training domains of `fedprompt.data.aerial_scenes` and never show a held-out class. The
federated domains are rendered for the evaluation table only, which does not affect the weights.

Shape suffixes: B pairs in a batch, N images, C classes, D joint embedding, d text width, L text
positions, F facts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from evaluate_tiny_clip import TOKENIZE, encode_text, evaluate, to_input
from numpy.typing import NDArray
from open_clip.model import CLIP
from safetensors.torch import save
from torch import Tensor

from fedprompt.backbone.tiny import (
    CARD_NAME,
    EMBEDDING,
    ROW_IDS,
    ROWS,
    WEIGHTS_NAME,
    initial_embedding,
)
from fedprompt.data import aerial_scenes as scenes
from fedprompt.data.aerial_scenes.captions import all_facts, caption, colours, image_facts
from fedprompt.rng import generator, normal

MODEL_CFG: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {
        "image_size": 64,
        "patch_size": 8,
        "width": 160,
        "layers": 4,
        "head_width": 32,
    },
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 4},
}
PREPROCESS_CFG = {
    "size": [64, 64],
    "mode": "RGB",
    "mean": list(open_clip.OPENAI_DATASET_MEAN),
    "std": list(open_clip.OPENAI_DATASET_STD),
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "fill_color": 0,
}
TRAIN_LENGTH = 28  # text positions of captions in training; embeddings of later ones stay random
CAPTIONS_PER_IMAGE = 8
TRAIN_CLASSES = tuple(
    c for c in scenes.CLASSES + scenes.EXTRA_CLASSES if c not in scenes.HELD_OUT_CLASSES
)


@dataclass(frozen=True)
class Pairs:
    """Images, several tokenised captions of each, and the facts that each shows or states."""

    images_N: NDArray[np.uint8]
    tokens_NKL: Tensor
    image_facts_NF: Tensor
    caption_facts_NKF: Tensor


def make_pairs(per_class: int, seed: int) -> Pairs:
    """Render `per_class` images of every training class and domain, and caption them."""
    column = {fact: i for i, fact in enumerate(all_facts())}
    images, texts = [], []
    count = len(TRAIN_CLASSES) * len(scenes.PRETRAINING_DOMAINS) * per_class
    image_facts_NF = torch.zeros(count, len(column), dtype=torch.bool)
    caption_facts = torch.zeros(count, CAPTIONS_PER_IMAGE, len(column), dtype=torch.bool)
    for name in TRAIN_CLASSES:
        for domain in scenes.PRETRAINING_DOMAINS:
            for index in range(per_class):
                n = len(images)
                image, notes = scenes.draw(name, domain, index)
                images.append(image)
                notes += colours(image)
                for fact in image_facts(name, domain, notes):
                    image_facts_NF[n, column[fact]] = True
                rng = generator(seed, "tiny_clip", "caption", name, domain, index)
                for k in range(CAPTIONS_PER_IMAGE):
                    drawn = caption(rng, name, domain, notes)
                    texts.append(drawn.text)
                    for fact in drawn.facts:
                        caption_facts[n, k, column[fact]] = True
    tokens = TOKENIZE(texts, context_length=TRAIN_LENGTH).reshape(
        count, CAPTIONS_PER_IMAGE, TRAIN_LENGTH
    )
    return Pairs(np.stack(images), tokens, image_facts_NF, caption_facts)


def augment(images_B: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Rotate, mirror and shift images, and vary their brightness; from above there is no up."""
    images_B = np.rot90(images_B, int(rng.integers(4)), axes=(1, 2))
    if rng.random() < 0.5:
        images_B = images_B[:, :, ::-1]
    shift = rng.integers(-4, 5, 2)
    padded = np.pad(images_B, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="reflect")
    images_B = padded[:, 4 + shift[0] : 68 + shift[0], 4 + shift[1] : 68 + shift[1]]
    gain = rng.uniform(0.85, 1.15, (len(images_B), 1, 1, 1))
    bias = rng.uniform(-12, 12, (len(images_B), 1, 1, 3))
    return np.clip(images_B * gain + bias, 0, 255).astype(np.uint8)


def new_model(vocabulary: int, length: int, patch_dropout: float, seed: int) -> CLIP:
    """open_clip's CLIP with a small vocabulary and short text, initialised from `seed`."""
    vision = {**MODEL_CFG["vision_cfg"], "patch_dropout": patch_dropout}
    text = {**MODEL_CFG["text_cfg"], "vocab_size": vocabulary, "context_length": length}
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # open_clip initialises from the global generator
        return CLIP(MODEL_CFG["embed_dim"], vision, text)


def whiten_patches(model: CLIP, images_N: NDArray[np.uint8]) -> None:
    """Start the patch embedding from the principal components of the training patches.

    Small vision transformers learn oriented filters slowly; this provides them from the start.
    """
    convolution = model.visual.conv1
    size, width = convolution.kernel_size[0], convolution.out_channels
    patches = (
        F.unfold(to_input(images_N), size, stride=size).transpose(1, 2).reshape(-1, 3 * size**2)
    )
    patches = patches - patches.mean(0)
    variance, axes = torch.linalg.eigh(patches.T @ patches / len(patches))
    best = variance.argsort(descending=True)[:width]
    filters = axes[:, best] / (variance[best] + 0.02).sqrt()
    with torch.no_grad():
        convolution.weight.copy_(filters.T.reshape(convolution.weight.shape))


def contrastive_loss(
    image_BD: Tensor, text_BD: Tensor, match_BB: Tensor, logit_scale: Tensor
) -> Tensor:
    """CLIP's symmetric loss, with targets spread over all captions that are true of an image.

    Args:
        image_BD: normalised image features.
        text_BD: normalised features of their captions.
        match_BB: whether caption j is true of image i.
        logit_scale: factor of the cosine similarities.
    """
    logits = logit_scale * image_BD @ text_BD.T
    match = match_BB.float()
    by_image = -(match / match.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1).mean()
    by_text = -(match / match.sum(0, keepdim=True) * logits.log_softmax(0)).sum(0).mean()
    return (by_image + by_text) / 2


def train(pairs: Pairs, args: argparse.Namespace) -> tuple[dict[str, Tensor], Tensor]:
    """Train the model.

    Args:
        pairs: the training data.
        args: the command's options.

    Returns:
        The state dict with all 77 text positions, and the ids of its rows of the vocabulary.
    """
    # Only tokens that occur are trained: the whole vocabulary would be most of the work.
    row_ids = torch.unique(pairs.tokens_NKL)  # sorted, so end-of-text keeps the largest id
    compact_NKL = torch.searchsorted(row_ids, pairs.tokens_NKL)
    model = new_model(len(row_ids), TRAIN_LENGTH, args.patch_dropout, args.seed)
    width = MODEL_CFG["text_cfg"]["width"]
    vocabulary = MODEL_CFG["text_cfg"]["vocab_size"]
    with torch.no_grad():
        full = initial_embedding(vocabulary, width, args.seed)
        model.token_embedding.weight.copy_(full[row_ids])
    whiten_patches(model, pairs.images_N[:: max(1, len(pairs.images_N) // 1000)])
    decay = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": decay, "weight_decay": args.weight_decay},
            {"params": plain, "weight_decay": 0},
        ],
        lr=args.lr,
        betas=(0.9, 0.98),
    )
    started = time.process_time()
    model.train()
    for step in range(args.steps):
        rng = generator(args.seed, "tiny_clip", "batch", step)
        rows = rng.choice(len(pairs.images_N), args.batch, replace=False)
        kth = torch.from_numpy(rng.integers(0, CAPTIONS_PER_IMAGE, args.batch))
        images = to_input(augment(pairs.images_N[rows], rng))
        stated = pairs.caption_facts_NKF[rows, kth].float()
        untrue = (~pairs.image_facts_NF[rows]).float()
        # A caption is true of an image unless it states a fact that is untrue of it.
        match_BB = untrue @ stated.T == 0
        warm = min(1.0, (step + 1) / (0.05 * args.steps))
        rate = args.lr * warm * 0.5 * (1.0 + math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        if step == int(0.9 * args.steps):
            model.visual.patch_dropout = torch.nn.Identity()  # finish on whole images
        with torch.random.fork_rng(), torch.autocast("cpu", torch.bfloat16):
            torch.manual_seed(int(rng.integers(2**31)))  # patch dropout
            image_BD = model.encode_image(images, normalize=True)
            text_BD = encode_text(model, compact_NKL[rows, kth])
        loss = contrastive_loss(
            image_BD.float(), text_BD.float(), match_BB, model.logit_scale.exp()
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0.0, math.log(100.0))
        if step % 50 == 0 or step == args.steps - 1:
            seconds = time.process_time() - started
            print(f"step {step:5d}  loss {loss.item():.3f}  {seconds:6.0f} s of CPU", flush=True)
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    length = MODEL_CFG["text_cfg"]["context_length"]
    positions = normal((length, width), 0.01, args.seed, "tiny_clip", "positional_embedding")
    positions[:TRAIN_LENGTH] = state["positional_embedding"]
    state["positional_embedding"] = positions
    return state, row_ids


def pack(state: dict[str, Tensor], row_ids: Tensor) -> dict[str, Tensor]:
    """The tensors as stored: float16, and only trained rows of the token embeddings, with ids."""
    stored = {name: t.half().contiguous() for name, t in state.items() if name != EMBEDDING}
    stored[ROWS] = state[EMBEDDING].half().contiguous()
    stored[ROW_IDS] = row_ids.to(torch.int32)
    return stored


def unpack(stored: dict[str, Tensor], seed: int) -> CLIP:
    """The model as users load it: float32, with the whole vocabulary."""
    state = {k: v.float() for k, v in stored.items() if k not in (ROWS, ROW_IDS)}
    text = MODEL_CFG["text_cfg"]
    state[EMBEDDING] = initial_embedding(text["vocab_size"], text["width"], seed)
    state[EMBEDDING][stored[ROW_IDS].long()] = stored[ROWS].float()
    model = CLIP(**MODEL_CFG)
    model.load_state_dict(state, strict=True)
    return model.eval().requires_grad_(False)


def main() -> None:
    """Train, evaluate and write the model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("fedprompt/backbone/assets"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--patch-dropout", type=float, default=0.5)
    parser.add_argument("--images", type=int, default=50, help="per class and domain")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pairs = make_pairs(args.images, args.seed)
    print(f"{len(pairs.images_N)} images rendered", flush=True)
    state, row_ids = train(pairs, args)
    stored = pack(state, row_ids)
    scores = evaluate(unpack(stored, args.seed))
    for name, value in scores.items():
        print(f"{value:7.1f}  {name}")
    write(stored, args, scores)


def write(stored: dict[str, Tensor], args: argparse.Namespace, scores: dict[str, Any]) -> None:
    """Write the weights with their provenance, and the card with the file's SHA-256.

    Args:
        stored: tensors from `pack`.
        args: the command's options.
        scores: accuracies from `evaluate`.
    """
    options = [f"--{k.replace('_', '-')} {v}" for k, v in vars(args).items() if k != "out"]
    provenance = {
        "command": "python scripts/pretrain_tiny_clip.py " + " ".join(options),
        "seed": args.seed,
        "scenes_version": scenes.VERSION,
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "open_clip": open_clip.__version__,
            "numpy": np.__version__,
        },
        "evaluation_percent": scores,
    }
    # A single key, because safetensors writes several in no fixed order, and the file must be
    # reproducible.
    data = save(stored, metadata={"provenance": json.dumps(provenance)})
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / WEIGHTS_NAME).write_bytes(data)
    card = {
        "model_cfg": MODEL_CFG,
        "preprocess_cfg": PREPROCESS_CFG,
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        "stored_as": "float16; token embeddings as touched rows with ids",
        "trained_text_positions": TRAIN_LENGTH,
        **provenance,
    }
    (args.out / CARD_NAME).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    print(f"{args.out / WEIGHTS_NAME}: {len(data):,} bytes")


if __name__ == "__main__":
    main()
