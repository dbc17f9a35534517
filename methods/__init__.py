"""Algorithms with state or policy in plain torch. They know kernels and architectures, never the host."""
