"""Metrics, and one evaluation protocol per file."""
