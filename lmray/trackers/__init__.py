"""Where a run's numbers are sent besides its own folder: one file a tracker."""
