"""Where the workers of a group meet: told to each in the environment variables that torchrun sets as well.

Ray Train's own configuration for torch does more in its controller, which would import torch for it, seconds before the
first worker starts. Here the controller imports nothing heavy; a worker joins the process group by itself.
"""

from __future__ import annotations

import os

import ray.train
from ray.train._internal.base_worker_group import BaseWorkerGroup
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig


class Rendezvous(BackendConfig):
    """Runs in the controller: worker 0's node is where they meet."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _Environment


class _Environment(Backend):
    share_cuda_visible_devices = True  # workers of one node copy between their GPUs

    def on_start(self, worker_group: BaseWorkerGroup, backend_config: BackendConfig) -> None:
        address, port = worker_group.execute_single(0, get_address_and_port)
        worker_group.execute(_tell, address, port)


def _tell(address: str, port: int) -> None:
    place = ray.train.get_context()
    told = {"MASTER_ADDR": address, "MASTER_PORT": port}
    told |= {"RANK": place.get_world_rank(), "WORLD_SIZE": place.get_world_size()}
    told |= {"LOCAL_RANK": place.get_local_rank(), "LOCAL_WORLD_SIZE": place.get_local_world_size()}
    os.environ |= {name: str(value) for name, value in told.items()}
