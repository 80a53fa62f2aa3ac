"""The text tokenizer, and the prompt templates that combine text with pictures and clips."""
