"""A Ray of four logical CPUs, with home, cache and store in a folder of the tests' own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray

OBJECT_STORE_BYTES = 100 * 2**20


@contextmanager
def local_ray(root: Path) -> Iterator[None]:
    settings = {
        "HOME": str(root),
        "LMRAY_CACHE": str(root / "cache"),
        "LMRAY_STORE": str(root / "store"),
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_DEDUP_LOGS": "0",
        "RAY_prestart_worker_first_driver": "0",
        # A replica that is slow to say how much it does is not passed over: a busy machine is no reason to move.
        "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "30",
        "RAY_SERVE_MAX_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "30",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # as where `connected` starts a Ray of its own
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        for name, value in settings.items():
            patch.setenv(name, value)
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level="ERROR",
        )
        try:
            yield
        finally:
            ray.shutdown()
