"""Quantized weights: code books, rotations, smoothing, low-rank branches, and what calibration says about a layer."""
