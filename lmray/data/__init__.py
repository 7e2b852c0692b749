"""From sources to batches: read rows, map them to examples, tokenise with an exact mask, pack, sample."""
