"""Training of the decoder and of the vision tokenizer: losses, optimiser, train step, training loop."""
