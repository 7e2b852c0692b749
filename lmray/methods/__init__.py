"""What is minimised: one file a method."""
