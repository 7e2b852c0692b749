"""What answers are scored by: one file a task."""
