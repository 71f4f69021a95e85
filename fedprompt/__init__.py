"""Federated prompt learning for CLIP: Flower clients with shared and private prompts."""

__version__ = "0.1.0"
