"""Plain twins for the tests of methods: open_clip's own modules, all 77 positions, loops.

Nothing here uses `fedprompt.text_tower`. Shape suffixes as in `fedprompt.methods.base`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.fields import build
from fedprompt.methods.base import Batch, Method, Task, Tensors, stack
from fedprompt.methods.registry import method_class
from fedprompt.rng import generator
from tests.support.builders import CLASS_NAMES, batch_of

START, END = 49406, 49407
K, B = 2, 5


def build_method(clip: FrozenCLIP, name: str, task: Task | None = None, **options: Any) -> Method:
    cls = method_class(name)
    config = build(cls.Config, {"name": name, **options}, "method")
    return cls(config, clip, task or Task(CLASS_NAMES))


def some_batch(clip: FrozenCLIP, step: int = 0, server_round: int = 1) -> Batch:
    """Two clients of five images; the second one's last two are padding."""
    draw = generator(0, "twin batch")
    features = torch.from_numpy(draw.standard_normal((K, B, clip.embed_dim))).float()
    labels = torch.tensor([[0, 1, 5, 1, 3], [2, 4, 2, 0, 0]])
    mask = torch.ones(K, B, dtype=torch.bool)
    mask[1, 3:] = False
    features = F.normalize(features, dim=-1)
    return batch_of(features, labels, mask, step=step, server_round=server_round)


def images_of(batch: Batch, k: int) -> tuple[Tensor, Tensor]:
    """The real images of one client: features (n, D) and labels (n,)."""
    real = batch.mask_KB[k]
    return batch.inputs.features[k][real], batch.labels_KB[k][real]


def moved(method: Method, scale: float = 0.05) -> Tensors:
    """Different shared tensors for every client, away from their start, as leaves."""
    shared = stack([method.init_shared(seed) for seed in range(1, K + 1)])
    noise = torch.Generator().manual_seed(7)
    for name, value in shared.items():
        if f"shared.{name}" not in method.frozen:
            by = scale * torch.randn(value.shape, generator=noise)
            shared[name] = (value + by).requires_grad_()
    return shared


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


def assert_close(ours: Tensor, theirs: Tensor, what: str = "") -> None:
    """At most 1e-4 of the largest value apart."""
    assert ours.shape == theirs.shape, what
    difference = float((ours - theirs).detach().abs().max())
    scale = float(theirs.detach().abs().max())
    assert difference <= 1e-4 * scale, f"{what}: {difference} of {scale}"
    assert scale > 0, f"{what}: nothing to compare"


def gradients(method: Method, shared: Tensors, batch: Batch) -> dict[str, Tensor]:
    """What the optimiser would be given, by name of the shared tensor."""
    leaves = {f"shared.{n}": t for n, t in shared.items() if t.requires_grad}
    loss_terms = method.loss_terms(shared, {}, method.encode(shared, {}), batch)
    found = method.gradients(loss_terms, leaves, batch)
    return {n.removeprefix("shared."): g for n, g in found.items() if g is not None}
