"""Control adapters."""
