"""From the config's `backbone` section to a `FrozenCLIP`, once per process before the first round.

`architecture.py` knows open_clip's models, `weights.py` finds, converts and maps their weights, and
`tokenizer.py` opens their tokenizers.
"""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import torch
from open_clip.model import CLIP
from torch import nn

from fedprompt.backbone.architecture import (
    adopt_weights,
    empty_model,
    model_settings,
    with_text_model,
)
from fedprompt.backbone.checkpoint_files import files_of
from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.compression import Compression, compress
from fedprompt.backbone.devices import pick_device, use_precision
from fedprompt.backbone.fingerprint import digest, file_digest
from fedprompt.backbone.model_folder import find_folder
from fedprompt.backbone.tiny import tiny_card, tiny_model_config, tiny_state_dict
from fedprompt.backbone.tokenizer import load_tokenizer
from fedprompt.backbone.weights import find_weights, kept_weights, map_weights, mappable_weights
from fedprompt.config.schema import BackboneConfig

TINY_IMAGE_BATCH = 256
"""Images that the tiny CLIP encodes in one call at least; smaller batches would only be slower."""


def load_clip(config: BackboneConfig, cache_dir: Path) -> FrozenCLIP:
    """Load the backbone that `config` names.

    Args:
        config: the config's `backbone` section.
        cache_dir: folder for float32 copies of checkpoints that cannot be mapped into memory
            directly (half precision, pickles). All processes of a machine share one copy in memory.

    Returns:
        The model on the configured device, its weights memory-mapped on a CPU.

    Raises:
        UserError: the model or tag is unknown, needs a package that is not installed, the weights
            cannot be downloaded, read or loaded into the model, there is no GPU, or the precision
            is not for this device.
    """
    device = pick_device(config.device)
    use_precision(config.precision, device)
    compression = Compression(config.weights, config.pruned)
    compression.check()
    if config.model == "tiny":
        return _load_tiny(config, compression, device)
    folder = find_folder(config.model)
    # The name of a local folder without its path, which differs between machines.
    name = config.model if folder is None else folder.name
    model_cfg, tag_cfg = model_settings(config, folder)
    # Before the weights: a tokenizer that is missing should not cost a download.
    tokenizer = load_tokenizer(config.model, model_cfg["text_cfg"])
    buildable_cfg = with_text_model(model_cfg, name, folder)
    source = find_weights(config, tag_cfg, folder)
    contents = "".join(file_digest(file, cache_dir) for file in files_of(source))
    weights_hash = digest(contents + json.dumps(model_cfg, sort_keys=True))
    model_cfg = buildable_cfg
    weights = mappable_weights(name, model_cfg, source, weights_hash, cache_dir)
    model = empty_model(model_cfg, meta=True)
    state = map_weights(weights)
    if compression:
        state = map_weights(kept_weights(model, state, compression, name, weights_hash, cache_dir))
    adopt_weights(model, state)
    preprocess_cfg = open_clip.transform.merge_preprocess_dict(
        open_clip.transform.PreprocessCfg(), tag_cfg
    )
    # As open_clip does: the size comes from the architecture and not from the tag.
    preprocess_cfg["size"] = model.visual.image_size
    open_clip.model.set_model_preprocess_cfg(model, preprocess_cfg)
    return FrozenCLIP(
        model,
        tokenizer,
        name=name,
        weights_hash=weights_hash,
        device=device,
        precision=config.precision,
        image_batch=config.image_batch,
        compression=compression,
    )


def _load_tiny(config: BackboneConfig, compression: Compression, device: str) -> FrozenCLIP:
    with torch.device("meta"):
        model = CLIP(**tiny_model_config())
    state = tiny_state_dict()
    adopt_weights(model, compress(model, state, compression) if compression else state)
    return FrozenCLIP(
        model,
        open_clip.tokenize,
        name="tiny",
        # `tiny_state_dict` has compared the file with this hash.
        weights_hash=tiny_card()["sha256"],
        device=device,
        precision=config.precision,
        image_batch=max(config.image_batch, TINY_IMAGE_BATCH),
        compression=compression,
    )


def shape_only_clip(name: str) -> FrozenCLIP:
    """Build a model with the tensor shapes of `name` and random weights, quickly.

    All layers of a tower share their tensors, and images are two patches wide. `fedprompt methods`
    counts the parameters of methods with it.

    Args:
        name: a model with open_clip's own transformers.
    """
    cfg = open_clip.get_model_config(name)
    assert cfg is not None
    layers = cfg["vision_cfg"]["layers"], cfg["text_cfg"]["layers"]
    cfg["vision_cfg"] |= {"layers": 1, "image_size": 2 * cfg["vision_cfg"]["patch_size"]}
    cfg["text_cfg"] |= {"layers": 1}
    model = empty_model(cfg, meta=False)
    for tower, count in zip((model.visual, getattr(model, "text", model)), layers, strict=True):
        tower.transformer.resblocks = nn.ModuleList([*tower.transformer.resblocks] * count)
    return FrozenCLIP(
        model, load_tokenizer(name, cfg["text_cfg"]), name=name, weights_hash="random"
    )
