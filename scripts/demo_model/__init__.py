"""The factory of the demo model: synthetic text, a tokenizer, a training loop and an examination."""
