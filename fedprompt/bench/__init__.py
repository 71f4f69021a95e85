"""Benchmarks: our implementation compared with a conventional one.

`scripts/bench.py` runs them. Both implementations run alternately in one process, so that a change
in the machine's load affects both, and their results must agree before times are reported. The
conventional implementation, the reference, is in `reference.py`; it also serves the tests.

Each subcommand has a module of its name; the others hold what several need. Every case is a row: a
flat dictionary with at least `case`, `ours_s`, `reference_s`, `ratio`, `max_rel_diff` and
`peak_mb`. Values that a case does not have are None.
"""
