"""Rotary position tables."""
