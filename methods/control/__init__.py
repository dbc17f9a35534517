"""Control adapters: their weights, and what they compute beside a frozen model."""
