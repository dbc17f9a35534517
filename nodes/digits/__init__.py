"""Prompt and codec of the digit models."""
