"""What the peers' trainers are timed by; imports nothing of lmray."""

from __future__ import annotations

import itertools
import json
import resource
import time

from transformers import TrainerCallback


class Clock(TrainerCallback):
    """Times every optimizer step, data loading included, and keeps the logged losses."""

    def __init__(self):
        self.ends, self.losses = [], []

    def on_train_begin(self, *_, **__):
        self.ends.append(time.time())

    def on_step_end(self, *_, **__):
        self.ends.append(time.time())

    def on_log(self, args, state, control, logs=None, **__):
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])

    def print(self):
        """The measurements as one JSON line."""
        seconds = [end - start for start, end in itertools.pairwise(self.ends)]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        found = {"seconds": seconds, "losses": self.losses, "peak_bytes": peak, "first_step_at": self.ends[1]}
        print(json.dumps(found), flush=True)
