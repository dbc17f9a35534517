"""Nodes that measure and report."""
