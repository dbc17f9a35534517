"""Attention patchers."""
