"""Building blocks that several methods share: prompts, layers, losses, wrappers and memories."""
