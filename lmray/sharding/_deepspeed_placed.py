"""A model in a DeepSpeed engine, as the learner uses it. Runs on every rank.

A checkpoint holds whole tensors, those of one parameter in the file of one rank, so that it loads at any world size
and stage: `NAME/weight`, `NAME/KEY` of the optimizer's state (`exp_avg`), and `KEY` alone for a number of the whole
optimizer (`step`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import safe_open

from lmray.errors import CheckpointError
from lmray.models.tensors import save_tensors
from lmray.sharding._ranks import of_first, sum_over_ranks, sum_tensor

WEIGHT = "weight"


class DeepspeedPlaced:
    """See `Placed`. The model is the module inside the engine: its own class, with the engine's hooks."""

    def __init__(self, deepspeed: ModuleType, engine: Any, *, on_disk: bool = False):
        self._deepspeed: Any = deepspeed
        self.engine, self.model, self.optimizer = engine, engine.module, engine.optimizer
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.whole: bool = engine.zero_optimization_stage() < 3
        self.saves_alone = False
        self._limit, self._on_disk = math.inf, on_disk

    @property
    def trained(self) -> dict[str, torch.nn.Parameter]:
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def all_sum(self, value: float) -> float:
        return sum_over_ranks(value, self.engine.device)

    def sum_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        return sum_tensor(tensor, self.engine.device)

    def of_first(self, tensor: torch.Tensor) -> torch.Tensor:
        return of_first(tensor, self.engine.device)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        self.optimizer.clear_backward_seen_flag()
        scaled = loss * self.world_size  # the engine takes the mean over ranks
        # The engine's own forward would do this, and end the autocast around it.
        scaled.register_hook(lambda _: self.engine._backward_prologue())
        self.engine.backward(scaled)

    def clip_grad_norm(self, max_norm: float) -> float:
        norm = min(self._norm(), self._limit)
        self._limit = min(self._limit, max_norm)
        self.optimizer.clip_grad = self._limit  # it scales as it steps
        return norm

    def _norm(self) -> float:
        measures = self._deepspeed.runtime.utils
        if self.whole:
            norm = self.optimizer.scaled_global_norm()
        else:
            norm = measures.combine_grad_norm_groups(self.optimizer._get_norm_groups())
        return math.nan if measures.is_invalid_grad_norm(norm) else float(norm)

    def apply(self, *, then: Callable[[], None] | None = None) -> None:
        self.engine.step()  # the gradients, of which each rank has its share only, are gone with it
        self._limit = math.inf
        if then is not None:
            then()

    def gathered_state(self, *, trained_only: bool = True) -> dict[str, torch.Tensor] | None:
        trained = self.trained
        gathered: dict[str, torch.Tensor] = {}
        copies: dict[int, torch.Tensor] = {}  # tied weights are gathered once
        self.engine.empty_partition_cache()  # a forward pass alone fetched weights for a backward pass that never came
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if trained_only and name not in trained:
                continue
            if id(tensor) not in copies:
                with self._gathered(tensor):
                    copies[id(tensor)] = tensor.detach().to("cpu", copy=True) if self.rank == 0 else tensor
            gathered[name] = copies[id(tensor)]
        return gathered if self.rank == 0 else None

    def _gathered(self, tensor: torch.Tensor, **changes: Any):
        """`tensor` in full inside, where it is a weight that is split."""
        return (
            self._deepspeed.zero.GatheredParameters([tensor], **changes) if hasattr(tensor, "ds_id") else nullcontext()
        )

    def save(self, folder: Path) -> None:
        full = self._deepspeed.utils
        keys, numbers = self._state()
        mine = {key: torch.as_tensor(value) for key, value in numbers.items()} if self.rank == 0 else {}
        for index, (name, parameter) in enumerate(self.trained.items()):
            state = {key: full.safe_get_full_optimizer_state(parameter, key) for key in keys}
            state[WEIGHT] = full.safe_get_full_fp32_param(parameter)
            if index % self.world_size == self.rank:
                mine |= {f"{name}/{key}": tensor.to("cpu") for key, tensor in state.items()}
        save_tensors(mine, folder / f"deepspeed-{self.rank:05d}.safetensors")

    def _state(self) -> tuple[list[str], dict[str, Any]]:
        """The optimizer's state of any one piece: keys of its tensors, and its numbers, the same for all pieces."""
        if self.whole:  # the engine itself finds the pieces of the first parameter group only
            pieces = self.optimizer.single_partition_of_fp32_groups
            for group, piece in zip(self.optimizer.bit16_groups, pieces, strict=True):
                self._deepspeed.utils.lazy_init_hp_params_optimizer_state(group, piece, self.optimizer.state)
        facts = next(iter(self.optimizer.state.values()), {})
        numbers = {key: value for key, value in facts.items() if not torch.is_tensor(value) or value.dim() == 0}
        return [key for key in facts if key not in numbers], numbers

    def load(self, folder: Path) -> None:
        if self._on_disk:  # DeepSpeed 0.19 went on with wrong weights
            found = "cannot be gone on with while weights or the optimizer's state lie on a disk"
            raise CheckpointError(str(folder), found, hint="offload to the `cpu` instead of `nvme`, or to nowhere")
        files = sorted(folder.glob("deepspeed-*.safetensors"))
        if not files:
            hint = "go on with the `sharding` it began with"
            raise CheckpointError(str(folder), "was saved by another strategy than `deepspeed`", hint=hint)
        with ExitStack() as stack:
            opened = [stack.enter_context(safe_open(path, framework="pt")) for path in files]
            found = {name: file for file in opened for name in file.keys()}  # noqa: SIM118
            self._check(folder, {name.rpartition("/")[0] for name in found if "/" in name})
            for name, parameter in self.trained.items():
                self._set_weight(parameter, found[f"{name}/{WEIGHT}"].get_tensor(f"{name}/{WEIGHT}"))
            if len(found) > len(self.trained):  # it was saved after a step
                self._make_state()
            keys, numbers = self._state()
            for name, parameter in self.trained.items():
                for key in keys:
                    self._set(parameter, key, found[f"{name}/{key}"].get_tensor(f"{name}/{key}"))
            for key in numbers:
                for facts in self.optimizer.state.values():  # a tensor each: they count on
                    facts[key] = found[key].get_tensor(key).to(facts[key].device, copy=True)

    def _check(self, folder: Path, names: set[str]) -> None:
        if other := sorted(names ^ set(self.trained)):
            raise CheckpointError(str(folder), f"does not fit what the job trains, first at {other[0]}")

    def _make_state(self) -> None:
        """An optimizer makes its state as it steps: a step of no size from no gradient."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        with torch.random.fork_rng():
            ids = torch.zeros(1, 2, dtype=torch.long, device=self.engine.device)
            self.backward(self.model(input_ids=ids).logits.sum() * 0.0, last=True)
        self.apply()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _set(self, parameter: torch.nn.Parameter, key: str, value: torch.Tensor) -> None:
        """Sets this rank's piece of the optimizer's `key`, WEIGHT being its own float32 copy, to that of `value`."""
        setters = self._deepspeed.utils
        value = value.to(self.engine.device)
        arguments = () if key == WEIGHT else (key,)
        if not self.whole:
            size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
            padded = torch.nn.functional.pad(value.flatten(), (0, size * self.world_size - value.numel()))
            piece = padded.narrow(0, size * self.rank, size)
            setter = setters.safe_set_local_optimizer_state if arguments else setters.safe_set_local_fp32_param
            setter(parameter, piece, *arguments)
        else:
            setter = setters.safe_set_full_optimizer_state if arguments else setters.safe_set_full_fp32_param
            setter(parameter, value, *arguments)

    def _set_weight(self, parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
        with torch.no_grad(), self._gathered(parameter, modifier_rank=0):
            parameter.copy_(value)
        self._set(parameter, WEIGHT, value)
