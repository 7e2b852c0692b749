"""Measuring a model on held-out examples: loss, and what it answers."""
