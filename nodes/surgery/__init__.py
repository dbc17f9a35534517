"""Nodes that change a model: calibration, grafts, training."""
