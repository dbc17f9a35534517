"""Nodes that condition a MODEL, and that combine LoRA."""
