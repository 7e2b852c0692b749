"""Who proposes tokens ahead of the model: one file, one member."""
