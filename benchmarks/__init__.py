"""Benchmarks of every op: `python -m benchmarks`. The same files are pytest-benchmark tests."""
