"""Quantized weights: how they are packed, and products with them."""
