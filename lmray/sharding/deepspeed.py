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
from importlib.util import find_spec
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
from lmray.sharding._deepspeed_placed import DeepspeedPlaced
from lmray.sharding._ranks import have_group
from lmray.sharding.base import Fill, MakeOptimizer, Need, Part, Placed, Sharding

Place = Literal["none", "cpu"]
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
    stage: Literal[1, 2, 3] = 2
    """1 splits the optimizer's state over the workers, 2 gradients as well, 3 weights as well."""
    offload_optimizer: Place = "none"
    """`cpu`: the optimizer's state lies in the host's memory, and its step is taken there."""
    offload_param: Place = "none"
    """`cpu`: weights that are not being computed with lie in the host's memory; stage 3 only."""
    config: str | None = None
    """A DeepSpeed configuration, JSON, whose path is good on every worker: buckets, overlap, prefetching and the
    like. What the job decides it may repeat or leave to `"auto"`."""

    @model_validator(mode="after")
    def _fits(self):
        if self.offload_param != "none" and self.stage < 3:
            raise ValueError(f"`offload_param` needs stage 3, found {self.stage}; hint: set `stage: 3`")
        return self

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
        sizes = {"num_trained": trained, "num_live": _live(model)}
        config = engine_config(read_config(self.config) if self.config else {}, self._zero(), **sizes)
        if self.stage == 3:  # each weight is split as it moves: no worker's device ever holds all of them
            for module in (*blocks_of(model), model) if fill else (model,):
                if fill:
                    fill(module, "cpu")
                deepspeed.zero.Init(module=module, config_dict_or_path=config)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
        return DeepspeedPlaced(deepspeed, engine)

    def _zero(self) -> dict[str, Any]:
        optimizer, param = {"device": self.offload_optimizer}, {"device": self.offload_param}
        return {"stage": self.stage, "offload_optimizer": optimizer, "offload_param": param}


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
    return deepspeed


class _ToStderr(logging.Handler):
    """To what is stderr when a record comes; deepspeed's own handler writes to stdout."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)
