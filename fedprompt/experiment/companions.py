"""Further frozen models that a method reads beside the backbone, such as a teacher."""

from __future__ import annotations

from pathlib import Path

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import load_clip
from fedprompt.config.fields import build
from fedprompt.config.schema import BackboneConfig, Config
from fedprompt.data.sections import resolve_group


def with_companions(clip: FrozenCLIP, config: Config, cache_dir: Path) -> FrozenCLIP:
    """Open the models that the experiment's method names, unless `clip` has them already.

    Args:
        clip: the frozen backbone.
        config: the experiment. Companions have the backbone's device and precision.
        cache_dir: folder for downloaded weights.

    Returns:
        `clip`, with its `companions`.

    Raises:
        UserError: weights cannot be downloaded, read or loaded into the model.
    """
    own = config.backbone
    for name in config.method.companions:
        if name not in clip.companions:
            keys = {
                **resolve_group("backbone", name),
                "device": own.device,
                "precision": own.precision,
                "deterministic": own.deterministic,
                "image_batch": own.image_batch,
            }
            clip.companions[name] = load_clip(build(BackboneConfig, keys, "backbone"), cache_dir)
    return clip
