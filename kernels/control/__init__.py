"""Pieces of control adapters that cost time: LoRA by segments, shuffled windows, the convolution between two streams."""
