"""How weights move along their gradients: one file an optimizer, by the names that Hugging Face's `optim` has."""
