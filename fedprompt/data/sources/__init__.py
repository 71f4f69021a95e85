"""Where images and class names come from; one source per file."""
