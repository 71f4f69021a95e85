"""Comparisons of finished runs: tables over seeds, significance tests and figures."""
