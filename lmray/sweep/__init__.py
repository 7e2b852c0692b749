"""Many trainings of one job with other values: which trial is which, which is best, and what they show."""
