"""Normalisation, modulation and gated residuals, fused."""
