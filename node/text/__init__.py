"""Between text and tokens: tokenizers, chat templates, text from a growing token list, stop strings."""
