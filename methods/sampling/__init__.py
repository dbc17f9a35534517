"""Samplers and schedules: what they compute and what they learn, in plain torch."""
