"""Kernels of samplers."""
