"""Benchmarks: each prints figures measured side by side in one run. Results: docs/benchmarks.md."""
