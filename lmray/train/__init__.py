"""The training program: plan, one learner, one loop, checkpoints, report."""
