"""The frozen CLIP that every participant holds, and how learned prompts pass through its towers.

- `loading.load_clip` opens the backbone once per process; `clip.FrozenCLIP` is what it returns.
- `text_tower.TextTower` turns learned text prompts into class features, in every training step and
  evaluation; `vision_tower.VisionTower` does the same for visual prompts and image features.
- `patch_features` gives features of image patches for the feature cache.
- `tiny` is the small model that is installed with the package.

The remaining modules are parts of these.
"""
