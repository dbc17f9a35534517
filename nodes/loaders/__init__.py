"""Weights that other projects published, put on a stock MODEL."""
