"""Benchmarks: what a policy is tried on, one folder or module each.

benchmark.py says what one is, find.py which there are. What runs in simulator processes needs no PyTorch.
docs/benchmark-of-your-own.md makes one from nothing.
"""
