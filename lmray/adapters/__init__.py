"""What is trained of a model: one file an adapter, over the `peft` library."""
