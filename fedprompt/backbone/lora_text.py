"""Fixed texts -> features, with low-rank additions to the top layers of the text tower.

No token is learned here, so what the layers below the first addition make of the texts is a
constant: it is computed once per class list. Above, causal attention still lets texts share what
they begin with, because a client's additions are the same for all of them: the common words come
once per bin, and equal beginnings of class names once (`packing.py`, `text_bins.py`). All clients
pass together, each with its own factors (`lora_layer.py`).

Shape suffixes: K clients, T texts, R rows of the packed texts, d width, D joint embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.hard_text import packed_texts
from fedprompt.backbone.lora_layer import Additions, clients_of, with_additions
from fedprompt.backbone.text_bins import BinTransformer
from fedprompt.backbone.text_sequences import checkpointed, positions_at_once
from fedprompt.backbone.token_rows import end_of_text, token_rows
from fedprompt.errors import UserError


class LoraText:
    """Features of one list of texts.

    Args:
        clip: the frozen backbone.
        texts: T texts.
        layers: how many of the tower's last layers have additions, at least 1.

    Raises:
        UserError: the text tower is of another kind, or a text does not fit into it.
    """

    def __init__(self, clip: FrozenCLIP, texts: Sequence[str], layers: int) -> None:
        parts = clip.text
        if not parts.packable:
            raise UserError(
                f"backbone: LoRA needs a causal text tower of open_clip's plain kind, and that of "
                f"{clip.name} is of another kind; choose another backbone, or "
                "method.text_layers=0."
            )
        self.clip, self.layers = clip, layers
        ids_TL = token_rows(clip.tokenizer, parts, texts, clip.name)
        ends = end_of_text(parts, ids_TL).tolist()
        rows = [row[: end + 1] for row, end in zip(ids_TL.tolist(), ends, strict=True)]
        # Texts that are computed together, so that the activations of one client fit.
        self._most = positions_at_once(clip.device, layers, parts.width)
        at_once = max(1, self._most // (max(ends) + 1))
        self._chunks = [
            self._prepared(rows[start : start + at_once]) for start in range(0, len(rows), at_once)
        ]
        self.rows = sum(transformer.rows for transformer, _ in self._chunks)
        clip.positions_encoded += self.rows

    def _prepared(self, rows: list[list[int]]) -> tuple[BinTransformer, Tensor]:
        """The packed texts, and their rows (R, d) at the input of the first adapted layer."""
        parts, layers = self.clip.text, self.clip.text_layers
        packing, suffix_BSd, before_Fd = packed_texts(parts, rows, repeats_prefix=True)
        transformer = BinTransformer(layers, packing, suffix_BSd, before_Fd, 0, parts.heads)
        return transformer, transformer.constant_input(len(layers) - self.layers)

    def __call__(self, additions: Additions) -> Tensor:
        """Features (K, T, D), float32, not normalised."""
        clients = clients_of(additions)
        self.clip.positions_encoded += clients * self.rows
        fits = clients * self.rows <= self._most
        features = []
        for transformer, start_Rd in self._chunks:
            run = partial(self._features, transformer, start_Rd, additions, clients)
            # Several chunks are computed again for the gradient, one after the other.
            features.append(run() if fits else checkpointed(run))
        return torch.cat(features, dim=1)

    def _features(
        self, transformer: BinTransformer, start_Rd: Tensor, additions: Additions, clients: int
    ) -> Tensor:
        parts = self.clip.text
        layers = with_additions(self.clip.text_layers, additions)
        hidden_KTd = transformer.run(start_Rd.repeat(clients, 1), layers, clients)
        return parts.project(parts.ln_final(hidden_KTd)).float()
