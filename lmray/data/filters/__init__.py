"""What text must not hold: one file a filter. A filter takes what it finds out of a text, or ends it there."""
