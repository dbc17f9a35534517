"""Nodes that load weights."""
