"""Benchmarks: both sides of a comparison in one run, figures as dicts."""
