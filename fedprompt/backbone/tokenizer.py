"""Opens the tokenizer that belongs to a model, once per process before the first round."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import open_clip
import torch
from torch import Tensor

from fedprompt.errors import UserError
from fedprompt.hub import stay_offline_if_unreachable


def load_tokenizer(model: str, text_cfg: Mapping[str, Any]) -> Callable[..., Tensor]:
    """Open the tokenizer that open_clip uses with a model.

    Args:
        model: `backbone.model`: a name that open_clip knows, or a folder or model on the hub.
        text_cfg: open_clip's settings of the model's texts.

    Returns:
        A function from texts to token ids (len(texts), L), padded or cut to the model's L text
        positions, or to `context_length` where it is given.

    Raises:
        UserError: the model's tokenizer is neither installed nor cached, and cannot be downloaded,
            or its vocabulary is missing.
    """
    special = text_cfg.get("hf_tokenizer_name") or text_cfg.get("tokenizer_kwargs")
    if not special and "siglip" not in model.lower():
        # CLIP's own tokenizer. open_clip holds one of it already; another would take 24 MB.
        length = text_cfg.get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH)
        return partial(open_clip.tokenize, context_length=length)
    stay_offline_if_unreachable()
    try:
        tokenizer: Callable[..., Tensor] = open_clip.get_tokenizer(model)
    except Exception as error:  # transformers' and the hub's errors have no common parent
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"backbone: the tokenizer of {model} could not be loaded: {reason}"
        ) from None
    first, second = tokenizer(["x", "y"])
    if torch.equal(first, second):
        # transformers makes a tokenizer without a vocabulary where it finds no file of one.
        raise UserError(
            f"backbone: the tokenizer of {model} knows no words; put the files of its vocabulary "
            "(tokenizer.json, vocab.txt or the like) beside its settings."
        )
    return tokenizer
