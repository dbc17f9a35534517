"""Kernels of the cache accelerators: forecasts and change measures over stored features."""
