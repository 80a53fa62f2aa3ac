"""Benchmarks of decoding, training and the vision tokenizer. Each yields figures as dicts.

A comparison measures both sides in the same run.
"""

# Tokens that a pass of parallel decoding settles: estimates for the 8 B model at W = 16 and 32.
TOKENS_PER_PASS = (2.5, 3.2)
