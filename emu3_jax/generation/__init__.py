"""From prompts to tokens, pictures and answers."""
