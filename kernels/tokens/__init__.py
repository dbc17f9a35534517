"""Moving rows of tokens."""
