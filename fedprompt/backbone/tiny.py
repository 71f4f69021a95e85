"""The embedded tiny CLIP: open_clip's own architecture with committed weights, without a download.

The quickstart, the tests and the demo run offline with it. `scripts/pretrain_tiny_clip.py` trains
it. The file stores float16 tensors. Of the 49,408 token embeddings it stores the rows that training
changed, with their ids; the others are a seeded draw, as open_clip initialises them.
"""

from __future__ import annotations

import copy
import hashlib
import json
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from fedprompt import rng
from fedprompt.errors import UserError
from fedprompt.files import asset

CARD_NAME = "tiny_clip.json"
WEIGHTS_NAME = "tiny_clip.safetensors"
ROW_IDS, ROWS = "token_embedding.row_ids", "token_embedding.rows"
EMBEDDING = "token_embedding.weight"


@cache
def tiny_card() -> dict[str, Any]:
    """Read model config, preprocessing and provenance of the weights from `tiny_clip.json`."""
    text = (resources.files("fedprompt.backbone") / "assets" / CARD_NAME).read_text(
        encoding="utf-8"
    )
    card: dict[str, Any] = json.loads(text)
    return card


def tiny_model_config() -> dict[str, Any]:
    """open_clip's model config: `embed_dim`, `vision_cfg`, `text_cfg`."""
    # A copy, because callers change it and the card is cached.
    config: dict[str, Any] = copy.deepcopy(tiny_card()["model_cfg"])
    return config


def tiny_weights_path() -> Path:
    """The weights file: beside this code, or else in the installed `fedprompt`.

    A Flower app bundle contains the code but no `.safetensors` file, so in a deployment the file
    comes from the package that is installed on the node.

    Raises:
        UserError: no installed copy holds the file.
    """
    return asset(f"backbone/assets/{WEIGHTS_NAME}")


def tiny_state_dict() -> dict[str, torch.Tensor]:
    """Read all tensors by name, float32; they load strictly into `CLIP(**tiny_model_config())`.

    Raises:
        UserError: the file is missing, or its SHA-256 differs from the card's.
    """
    path = tiny_weights_path()
    data = path.read_bytes()
    card = tiny_card()
    # Read and hashed in one go, so that the bytes that are used are the bytes that were checked.
    advice = "it is damaged or from another version; reinstall fedprompt."
    if hashlib.sha256(data).hexdigest() != card["sha256"]:
        raise UserError(f"backbone: {path} does not match {CARD_NAME}: {advice}")
    try:
        stored = load(data)
    except SafetensorError:
        raise UserError(f"backbone: {path} is not a safetensors file: {advice}") from None
    ids = stored.pop(ROW_IDS).long()
    rows = stored.pop(ROWS).float()
    state = {name: tensor.float() for name, tensor in stored.items()}
    vocabulary = int(card["model_cfg"]["text_cfg"]["vocab_size"])
    embedding = initial_embedding(vocabulary, rows.shape[1], int(card["seed"]))
    embedding[ids] = rows
    state[EMBEDDING] = embedding
    return state


def initial_embedding(vocabulary: int, width: int, seed: int) -> torch.Tensor:
    """Draw the token embeddings before training from N(0, 0.02^2).

    Args:
        vocabulary: number of tokens.
        width: d of the text tower.
        seed: seed of the pre-training, from the card.

    Returns:
        (vocabulary, width), float32.
    """
    # A copy, because callers change it.
    return _drawn_embedding(vocabulary, width, seed).clone()


@cache
def _drawn_embedding(vocabulary: int, width: int, seed: int) -> torch.Tensor:
    """Drawn once per process: it takes most of the time in which the model is opened."""
    return rng.normal((vocabulary, width), 0.02, seed, "tiny_clip", EMBEDDING)
