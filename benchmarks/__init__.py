"""Benchmarks: `python -m benchmarks.<name>`. Paired in one process, parity checked before anything is timed."""
