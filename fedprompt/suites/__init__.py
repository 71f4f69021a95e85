"""Benchmark suites: named, versioned comparisons, and the result files that they leave."""
