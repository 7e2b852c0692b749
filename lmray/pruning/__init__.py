"""What of a model can be removed, which of it is, and the smaller model that is left."""
