"""How a model lies on the workers: one file a strategy."""
