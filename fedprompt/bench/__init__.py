"""Benchmarks: our path against the usual one, interleaved in one process, with equal results.

`scripts/bench.py` runs them; one module per subcommand. Every case is a row, a flat dict with at
least `case`, `ours_s`, `reference_s`, `ratio`, `max_rel_diff` and `peak_mb` (None where a case has
no such number).
"""
