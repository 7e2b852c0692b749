"""Metrics: their one list of names, the event log of a run, and its pictures."""
