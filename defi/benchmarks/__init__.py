"""Benchmarks: each a folder that says which episodes there are, makes its world, and judges."""
