"""Benchmarks: each prints figures measured side by side in one run. Results: README.md here."""
