"""Convolutions over the token grid, channels last."""
