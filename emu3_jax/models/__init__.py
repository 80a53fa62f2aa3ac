"""Flax Linen modules: the vision tokenizer and the decoder."""
