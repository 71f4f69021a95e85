"""A text tower's own pass, from the embeddings of prompts to the hidden states that are pooled.

`TextTower` takes it where the fast paths do not apply: towers that are not causal, that have a
class embedding, or that come from Hugging Face. Learned prompts are already among the embeddings;
deep ones enter between the blocks. The texts of a call end at the same position, so that what
follows this position can be left out where no other position sees it.

Shape suffixes: N prompts, G texts that end at the same position, L positions of them, d width,
h heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from open_clip.hf_model import HFTextEncoder
from torch import Tensor, nn

from fedprompt.backbone.text_sequences import Adapt

Enter = Callable[[int, Tensor], Tensor]
"""From a layer's number and its input (N, G, positions, d) to that input with deep prompts."""


class TextPass(Protocol):
    """A text tower from embeddings to pooled hidden states.

    Attributes:
        padding_seen: how many positions after the end of a text are looked at, although they hold
            padding.
    """

    padding_seen: int

    def __call__(
        self, x_NGLd: Tensor, ids_GL: Tensor, end: int, enter: Enter | None, adapt: Adapt | None
    ) -> Tensor:
        """Run the tower's blocks.

        Args:
            x_NGLd: embeddings, with the positions that `TextParts` adds to them.
            ids_GL: the texts' token ids, with placeholders for learned prompts.
            end: position of the texts' last token.
            enter: replaces learned prompts at the input of a layer.
            adapt: adds to the output of blocks; only where `TextParts.adaptable`.

        Returns:
            (N, G, d), before the last norm of `TextParts`.
        """
        ...


class OpenClipPass:
    """The pass through open_clip's own transformer.

    Args:
        text: open_clip's text tower.
        pool_type: its pooling.
    """

    def __init__(self, text: Any, pool_type: str) -> None:
        self.text, self.pool_type = text, pool_type
        self.class_embedding: Tensor | None = getattr(text, "cls_emb", None)
        self.masks_padding = self.class_embedding is not None or getattr(
            text, "use_pad_mask", False
        )
        # Published weights of CoCa were trained with a mask that is shifted by one position: the
        # first padding is seen, and the class embedding does not see itself.
        shifted = self.class_embedding is not None and not text.correct_cls_mask
        self.padding_seen = int(shifted)

    def __call__(
        self, x_NGLd: Tensor, ids_GL: Tensor, end: int, enter: Enter | None, adapt: Adapt | None
    ) -> Tensor:
        """Run the tower's blocks, as `TextPass` says."""
        n, g = x_NGLd.shape[:2]
        x = x_NGLd.flatten(0, 1)
        if self.class_embedding is not None:
            # It takes the last position of the tower, however short the text is.
            last_d = self.class_embedding + self.text.positional_embedding[-1]
            x = nn.functional.pad(x, (0, 0, 0, 1))
            x[:, -1] = last_d
        mask = self._mask(ids_GL, x)
        for i, block in enumerate(self.text.transformer.resblocks):
            if enter is not None:
                x = enter(i, x.unflatten(0, (n, g))).flatten(0, 1)
            added = None if adapt is None else adapt(i, block, x.unflatten(0, (n, g)))
            # Three axes: one mask per text and head, for each prompt again.
            repeats = mask is not None and mask.ndim == 3
            x = block(x, attn_mask=mask.repeat(n, 1, 1) if repeats else mask)
            if added is not None:
                # An adapter may turn the prompts of one client into those of several.
                n = added.shape[0]
                x = (x.unflatten(0, (-1, g)) + added).flatten(0, 1)
        pooled_NGd: Tensor = x[:, self._pooled(end)].unflatten(0, (n, g))
        return pooled_NGd

    def _mask(self, ids_GL: Tensor, x: Tensor) -> Any:
        """What is added to attention scores: (L, L), (G * h, L, L) or None."""
        length = x.shape[1]
        causal = self.text.attn_mask
        mask = None if causal is None else causal[:length, :length].to(x)
        if self.masks_padding:
            padding = self.text._build_additive_mask(ids_GL, length, x.dtype)
            mask = padding if mask is None else mask + padding
        return mask

    def _pooled(self, end: int) -> int:
        if self.class_embedding is not None:
            return -1
        return {"argmax": end, "eos": end, "first": 0, "last": -1}[self.pool_type]


class HuggingFacePass:
    """The pass through a model of transformers, with prompts as `inputs_embeds`.

    Args:
        encoder: open_clip's wrapper, with its pooler.
        blocks: the model's blocks.
        pad_id: id of the padding.
    """

    padding_seen = 0

    def __init__(self, encoder: HFTextEncoder, blocks: Any, pad_id: int) -> None:
        self.encoder, self.blocks, self.pad_id = encoder, blocks, pad_id

    def __call__(
        self, x_NGLd: Tensor, ids_GL: Tensor, end: int, enter: Enter | None, adapt: Adapt | None
    ) -> Tensor:
        """Run the model, as `TextPass` says. Positions and token types are its defaults."""
        shape = x_NGLd.shape[:2]
        mask = ids_GL.ne(self.pad_id).long().repeat(shape[0], 1)
        with _entering(self.blocks, enter, shape):
            hidden = self.encoder.transformer(
                inputs_embeds=x_NGLd.flatten(0, 1), attention_mask=mask
            )
        pooled_NGd: Tensor = self.encoder.pooler(hidden, mask).unflatten(0, shape)
        return pooled_NGd


@contextmanager
def _entering(blocks: Any, enter: Enter | None, shape: Any) -> Iterator[None]:
    """Let `enter` change the input of every block.

    Hooks, because the models differ in what else they hand from block to block: masks of several
    kinds, or the position bias of the first.
    """
    if enter is None:
        yield
        return

    def hook(i: int) -> Callable[[Any, tuple[Any, ...]], tuple[Any, ...]]:
        def change(_: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            x, *others = arguments
            return (enter(i, x.unflatten(0, shape)).flatten(0, 1), *others)

        return change

    handles = [block.register_forward_pre_hook(hook(i)) for i, block in enumerate(blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
