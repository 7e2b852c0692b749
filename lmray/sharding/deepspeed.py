"""ZeRO through the `deepspeed` library: optimizer state, gradients and weights split over the workers, or offloaded.

Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", arXiv 1910.02054: stage 1
splits the optimizer's state, stage 2 the gradients as well, stage 3 the weights as well; section 5. Rajbhandari et
al., "ZeRO-Infinity", arXiv 2104.07857: offloading. Differs from the papers in: gradients are summed, not averaged.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal

import torch
from pydantic import model_validator

from lmray.errors import CapacityError, ConfigError
from lmray.sharding._blocks import blocks_of
from lmray.sharding._deepspeed_config import (
    bucket_size,
    check_config,
    engine_config,
    flat,
    job_says,
    read_config,
)
from lmray.sharding._deepspeed_nvme import check_absolute, made_ready, remove_with
from lmray.sharding._deepspeed_placed import DeepspeedPlaced
from lmray.sharding._ranks import have_group
from lmray.sharding.base import Fill, MakeOptimizer, Need, Part, Placed, Sharding

Place = Literal["none", "cpu", "nvme"]
SPLIT = {1: "the optimizer's state is", 2: "gradients and the optimizer's state are", 3: "weights and all else are"}
DIVIDED: dict[int, frozenset[Part]] = {
    1: frozenset({"optimizer"}),
    2: frozenset({"optimizer", "gradients"}),
    3: frozenset({"optimizer", "gradients", "weights"}),
}
NUM_BUFFERS = 3
"""Of a bucket's size in float32: gradients as they are collected, as they are sent, and summed."""
ELEMENTWISE = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
"""Optimizers for which a piece of a flattened tensor is as good as the tensor."""


class Deepspeed(Sharding):
    """ZeRO, stage 1, 2 or 3, with offloading."""

    keeps_masters: ClassVar[bool] = True
    gathers_masters: ClassVar[bool] = True
    owns_backward: ClassVar[bool] = True
    stage: Literal[1, 2, 3] = 2
    """1 splits the optimizer's state over the workers, 2 gradients as well, 3 weights as well."""
    offload_optimizer: Place = "none"
    """`cpu`: the optimizer's state lies in the host's memory, and its step is taken there; `nvme`: on a disk, and the
    step is taken in the host's memory as well; stage 3 only."""
    offload_param: Place = "none"
    """`cpu`: weights that are not being computed with lie in the host's memory; `nvme`: on a disk. Stage 3 only."""
    nvme_path: str | None = None
    """For `nvme`: a folder on a disk of each worker's own. Every rank keeps its part in a folder in it, which goes with
    the run. Of a megabyte at least is what goes to the disk: smaller pieces stay in the host's memory. A run that was
    interrupted goes on from its checkpoint without `nvme` only."""
    config: str | None = None
    """A DeepSpeed configuration, JSON, whose path is good on every worker: buckets, overlap, prefetching and the
    like. What the job decides it may repeat or leave to `"auto"`."""

    @model_validator(mode="after")
    def _fits(self):
        if self.offload_param != "none" and self.stage < 3:
            raise ValueError(f"`offload_param` needs stage 3, found {self.stage}; hint: set `stage: 3`")
        if self._on_disk and self.stage < 3:
            raise ValueError(f"`nvme` needs stage 3, found {self.stage}; hint: set `stage: 3`")
        if self._on_disk != (self.nvme_path is not None):
            raise ValueError("`nvme_path` and offloading to `nvme` need each other; hint: set both or neither")
        return self

    @property
    def _on_disk(self) -> bool:
        return "nvme" in (self.offload_optimizer, self.offload_param)

    @property
    def goes_on(self) -> bool:
        return not self._on_disk

    @property
    def divides(self) -> frozenset[Part]:  # type: ignore[override]
        return DIVIDED[self.stage]

    def buffer_bytes(self, trained: int) -> int:
        return NUM_BUFFERS * 4 * bucket_size(trained)

    def resolve(self, *, workers: int, need: Need | None = None) -> tuple[Sharding, str]:
        if find_spec("deepspeed") is None:
            hint = 'pip install "lmray[deepspeed]", here and on the workers, or `sharding: fsdp2`'
            raise CapacityError("sharding", "`deepspeed` needs the package `deepspeed`", hint=hint)
        return self, f"ZeRO stage {self.stage}: {SPLIT[self.stage]} split over {workers} workers"

    def check(self, train: Mapping[str, Any], *, workers: int, dtype: str) -> None:
        if self.nvme_path is not None:
            check_absolute(self.nvme_path)  # the disk is the workers', and looked at there
        if self.config is not None:
            says = job_says(train, workers=workers, dtype=dtype)
            says |= {key: (value, f"sharding.{key.split('.')[1]}") for key, value in flat(self._zero()).items()}
            check_config(read_config(self.config), says, self.config)

    def place(
        self,
        model: torch.nn.Module,
        make_optimizer: MakeOptimizer,
        device: str,
        *,
        dtype: str = "float32",
        fill: Fill | None = None,
    ) -> Placed:
        optimizer = make_optimizer(model)  # first of all: it tells matrices by shapes that stage 3 takes away
        if type(optimizer) not in ELEMENTWISE:
            allowed = ", ".join(kind.__name__ for kind in ELEMENTWISE)
            raise ConfigError("sharding", f"{type(optimizer).__name__} cannot be split by `deepspeed`", allowed=allowed)
        deepspeed = _imported(device)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        sizes: dict[str, Any] = {"num_trained": trained, "num_live": _live(model)}
        folder = made_ready(self.nvme_path) if self.nvme_path else None
        if folder is not None:
            sizes["num_largest"] = max(parameter.numel() for parameter in model.parameters())
        config = engine_config(read_config(self.config) if self.config else {}, self._zero(folder), **sizes)
        if self.stage == 3:  # each weight is split as it moves: no worker's device ever holds all of them
            swapper = None  # one for all: a new one clears the disk of what the last has written
            for module in (*blocks_of(model), model) if fill else (model,):
                if fill:
                    fill(module, "cpu")
                init = deepspeed.zero.Init(module=module, config_dict_or_path=config, param_swapper=swapper)
                swapper = init.param_swapper
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
        placed = DeepspeedPlaced(deepspeed, engine, on_disk=folder is not None)
        if folder is not None:
            remove_with(placed, folder)
        return placed

    def _zero(self, folder: Path | None = None) -> dict[str, Any]:
        """Its own section of DeepSpeed's settings. `folder`: where this rank keeps what goes to a disk."""
        offloaded = {"offload_optimizer": self.offload_optimizer, "offload_param": self.offload_param}
        path = str(folder or self.nvme_path)
        return {"stage": self.stage} | {
            key: {"device": place, "nvme_path": path} if place == "nvme" else {"device": place}
            for key, place in offloaded.items()
        }


def _live(model: torch.nn.Module) -> int | None:
    """Elements of two blocks, the one that is computed with and the next, and of what is in none."""
    blocks = [sum(one.numel() for one in block.parameters()) for block in blocks_of(model)]
    total = sum(parameter.numel() for parameter in model.parameters())
    return total - sum(blocks) + 2 * max(blocks) if blocks else None


def _imported(device: str) -> ModuleType:
    """deepspeed, set to `device` and to the process group that is there (else to one of this process alone), writing
    nothing to stdout and compiling nothing."""
    kind, index = torch.device(device).type, torch.device(device).index
    os.environ["DS_ACCELERATOR"] = kind
    os.environ["LOCAL_RANK"] = str(index or 0)  # which of the devices it sees
    have_group(device)
    import deepspeed

    # Else minutes of compiling, for an operation of inference over shared memory alone.
    deepspeed.ops.__compatible_ops__ = {}  # type: ignore[attr-defined]
    logging.getLogger("DeepSpeed").handlers = [_ToStderr()]
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    deepspeed.init_distributed(auto_mpi_discovery=False, dist_init_required=False, verbose=False)
    # Its groups would wait for torch's default, ten minutes with NCCL: less than the watchdog, which says more.
    world: Any = torch.distributed.group.WORLD
    timeout = world._get_backend(torch.device(kind)).options._timeout
    deepspeed.comm.comm.cdb.new_group = partial(torch.distributed.new_group, timeout=timeout)  # type: ignore[attr-defined]
    return deepspeed


class _ToStderr(logging.Handler):
    """To what is stderr when a record comes; deepspeed's own handler writes to stdout."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)
