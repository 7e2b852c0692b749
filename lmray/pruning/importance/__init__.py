"""What units are worth before anything is trained, for pruning in two stages: first cut, then tune what is left."""
