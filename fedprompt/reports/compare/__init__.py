"""Finished runs side by side: tables over seeds, tests, figures."""
