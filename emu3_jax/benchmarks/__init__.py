"""Benchmarks of decoding, training and the vision tokenizer. Each yields figures as dicts.

A comparison measures both sides in the same run.
"""
