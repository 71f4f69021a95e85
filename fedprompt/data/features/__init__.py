"""Features of images: encoded once, kept on disk, read as tables."""
