"""Prompt-learning methods, one paper per file."""
