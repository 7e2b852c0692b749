"""Decisions as plain data and pure functions, standard library only: Ray Serve pickles a policy by value."""
