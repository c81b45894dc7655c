"""Benchmarks: every comparison in one run, side by side."""
