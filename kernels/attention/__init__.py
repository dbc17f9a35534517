"""Attention kernels, [B, H, N, D]."""
