"""Cache accelerators."""
