"""Attention methods: which pairs are computed, and how."""
