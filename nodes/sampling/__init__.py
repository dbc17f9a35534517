"""Samplers and schedules."""
