"""Linear attention: operators whose cost grows with the number of tokens, [B, H, N, D]."""
