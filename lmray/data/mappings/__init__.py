"""How a row becomes an example: one file a mapping."""
