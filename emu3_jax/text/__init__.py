"""Text to token ids and back: the byte-pair tokenizer and the prompt templates around it."""
