"""Batch inference: a data set's prompts answered by the engines that also serve, shard by shard."""
