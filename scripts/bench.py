"""Benchmarks against a conventional implementation: `python scripts/bench.py --help`."""

from __future__ import annotations

from fedprompt.bench.cli import main

if __name__ == "__main__":
    main()
