"""Learning rates over a run: one file a schedule, by the names that Hugging Face's `lr_scheduler_type` has."""
