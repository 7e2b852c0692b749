"""Out of memory while a model is placed or trained: known for what it is, noted in the run folder, told with the plan's
estimate and what would fit. Runs on the rank that it happens to: the others may wait for that one in a collective, so
nothing is asked of them.

An attempt that ran out ends. Under `resources.on_oom: halve` another goes on from the last checkpoint with half the
micro-batch; rows of a step and the curve stay, for losses are sums over a count of the whole step. Only what dropout
draws depends on how a step's rows are cut into micro-batches.

`memory.json` of the run folder: `micro_batch`, the rows of a forward pass to go on with, and `history`, what ran out.
"""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from lmray.artifacts.files import write_json
from lmray.context import RunContext
from lmray.errors import CheckpointError, LmrayError, OutOfMemoryError
from lmray.job import TrainJob
from lmray.models.machine import is_out_of_memory, release_heap, this_machine
from lmray.train.memory import USABLE, largest_micro_batch
from lmray.train.peak import peak_memory_bytes
from lmray.train.plan import Plan, make_plan
from lmray.train.preflight import worker_memory
from lmray.train.prepare import Prepared
from lmray.train.record import MEMORY
from lmray.units import human_bytes

T = TypeVar("T")

CPU_TEXT = re.compile(r"you tried to allocate (\d+) bytes")
MEASURING, PLACING = "the result was measured", "the model was placed"
LESS: Mapping[str, Any] = {"train.gradient_checkpointing": True, "sharding": "fsdp2", "model.dtype": "bfloat16"}
"""Settings that take less memory in most jobs; the plan says whether, and how much, in one."""


class RanOutError(Exception):
    """Ends an attempt. Holds nothing of the step, whose tensors are free once this is handled."""

    def __init__(self, step: int | None, found: str, *, doing: str):
        super().__init__(step, found)
        self.step, self.found, self.doing = step, found, doing


@contextmanager
def noticing_shortage(step: int | None, *, doing: str = PLACING) -> Iterator[None]:
    """Raises RanOutError where the block, which takes optimizer step number `step`, or none: then `doing` says what it
    does, runs out of memory; any other error passes."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise RanOutError(step, _in_words(error), doing=doing) from None


def _in_words(error: BaseException) -> str:
    text = str(error).strip()
    if asked := CPU_TEXT.search(text):
        return f"{human_bytes(int(asked[1]))} could not be allocated"
    first, _, _ = text.partition(" If reserved but unallocated")  # PyTorch's advice about its own allocator follows
    return first.partition("\n")[0] or "Python could not allocate an object"


def with_room(job: TrainJob, plan: Plan, prepared: Prepared, ctx: RunContext, attempt: Callable[[int], T]) -> T:
    """What `attempt(micro_batch)` gives. Where it runs out of memory that is noted in the run folder; with no other
    rank to begin anew as well, this one tries again with half of the micro-batch. Raises OutOfMemoryError where the job
    does not want that, where there is no half, or where there are other ranks."""
    while True:
        micro_batch = ctx.agreed(lambda: _micro_batch(job, ctx))
        try:
            return attempt(micro_batch)
        except RanOutError as ran_out:
            shortage = {"micro_batch": micro_batch, "step": ran_out.step, "doing": ran_out.doing}
            shortage |= {"rank": ctx.rank, "found": ran_out.found}
        _release(ctx.device)  # now that nothing holds the attempt's model
        _note(job, ctx, shortage)
        if _half(job, shortage) is None or ctx.world_size > 1:
            raise _error(job, plan, prepared, ctx, shortage)


def _half(job: TrainJob, shortage: Mapping[str, Any]) -> int | None:
    """Rows of a forward pass to try next; None where the job does not want that, or it would not help."""
    halves = job.resources.on_oom == "halve" and shortage["step"] is not None and shortage["micro_batch"] > 1
    return shortage["micro_batch"] // 2 if halves else None


def _micro_batch(job: TrainJob, ctx: RunContext) -> int:
    """Rows of a forward pass to begin with; people are told where they are not the job's."""
    own, path = job.train.per_device_train_batch_size, ctx.folder / MEMORY
    if job.resources.on_oom == "fail" or not path.is_file():
        return own
    noted = ctx.patience(
        f"reading {path}", lambda: _read(path), hint=f"once {path} can be read, the same command goes on"
    )
    found = min(own, noted["micro_batch"])
    if found < own:
        last = noted["history"][-1]
        ctx.patience.say(
            f"run `{job.name}`: {found} row(s) a forward pass instead of {own}, and as many a step as before, for it "
            f"ran out of memory {shortage_text(last)}: {last['found']}"
        )
    return found


def _note(job: TrainJob, ctx: RunContext, shortage: Mapping[str, Any]) -> None:
    """Adds `shortage` to the run folder. Ranks that run out in one step write the same but for themselves; the last one
    stays."""
    path, rows = ctx.folder / MEMORY, shortage["micro_batch"]
    left = rows if shortage["step"] is None else max(1, rows // 2)

    def write() -> None:
        history = _read(path)["history"] if path.is_file() else []
        write_json(path, {"micro_batch": left, "history": [*history, shortage]})

    try:
        ctx.patience(f"writing {path}", write, hint=f"once {path} can be written, the same command goes on")
    except CheckpointError as error:  # of one rank alone, as what it was to note is
        found = f"ran out of memory {shortage_text(shortage)}, and {error.where} {error.found}"
        raise OutOfMemoryError(f"run `{job.name}`", found, hint=error.hint) from None


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def shortage_text(shortage: Mapping[str, Any]) -> str:
    """When and where an entry of `history` came about."""
    step, rows = shortage["step"], shortage["micro_batch"]
    when = f"at step {step} with {rows} row(s) a forward pass" if step else f"while {shortage.get('doing', PLACING)}"
    return f"{when}, on worker {shortage['rank']}"


def _release(device: str) -> None:
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    release_heap()


def _error(
    job: TrainJob, plan: Plan, prepared: Prepared, ctx: RunContext, shortage: Mapping[str, Any]
) -> OutOfMemoryError:
    on_gpu, micro_batch = plan.device == "cuda", shortage["micro_batch"]
    room = worker_memory([this_machine()], workers=ctx.world_size, on_gpu=on_gpu)
    peak = peak_memory_bytes(ctx.device)["train.peak_gpu_memory_bytes" if on_gpu else "train.peak_memory_bytes"]
    parts = ", ".join(f"{part} {human_bytes(size)}" for part, size in plan.memory_bytes.items() if part != "total")
    own, total = job.train.per_device_train_batch_size, human_bytes(plan.memory_bytes["total"])
    fewer = f", or {human_bytes(planned_bytes(job, plan, micro_batch))} with {micro_batch}" if micro_batch < own else ""
    found = (
        f"ran out of memory {shortage_text(shortage)}: {shortage['found']}; the process took {human_bytes(peak)} "
        f"{'of the GPU ' if on_gpu else ''}at most. Planned: {total} ({parts}) with {own} row(s) a forward pass{fewer}"
        f"; a worker has {human_bytes(room) if room else 'an unknown amount'} here"
    )
    error = OutOfMemoryError(f"run `{job.name}`", found)
    error.micro_batch = _half(job, shortage)
    if error.micro_batch is None:
        error.hint = _hint(job, plan, prepared, shortage, room)
    return error


def _hint(job: TrainJob, plan: Plan, prepared: Prepared, shortage: Mapping[str, Any], room: int | None) -> str:
    if shortage["doing"] == MEASURING:
        fewer = f"`evaluate.batch_size={max(1, job.evaluate.batch_size // 2)}`"
        return (
            f"with more memory the same command measures what is in its last checkpoint; under another `name`: {fewer}"
        )
    steps = shortage["step"] is not None
    fits = fitting(job, plan, prepared, shortage["micro_batch"], room, steps=steps)
    ways = [f"under another `name`: {', '.join(fits)}"] if fits else []
    if steps and job.resources.on_oom == "fail" and shortage["micro_batch"] > 1:
        ways.insert(0, "the same job with `resources.on_oom=halve` goes on from its last checkpoint")
    return "; or ".join(ways) or "take a machine with more memory, or lower `data.max_length`"


def fitting(
    job: TrainJob, plan: Plan, prepared: Prepared, micro_batch: int, room: int | None, *, steps: bool = True
) -> list[str]:
    """Settings that the planner says take less than `micro_batch` rows did, and less than `room` bytes, each with what
    is planned for it. `steps`: other micro-batches as well."""
    bound = planned_bytes(job, plan, micro_batch)
    bound = bound if room is None else min(bound, USABLE * room)
    found = []
    rows, per_step = smaller_micro_batch(job, plan, micro_batch, room), job.train.per_device_train_batch_size
    per_step *= job.train.gradient_accumulation_steps
    if steps and rows:
        setting = f"train.per_device_train_batch_size={rows} train.gradient_accumulation_steps={per_step // rows}"
        found.append((setting, planned_bytes(job, plan, rows)))
    for key, value in LESS.items():
        planned = _planned_with(job, plan, prepared, {key: value}, micro_batch)
        if planned is not None and planned < bound:
            found.append((f"{key}={value if isinstance(value, str) else json.dumps(value)}", planned))
    return [f"`{setting}` ({human_bytes(planned)} planned)" for setting, planned in found]


def planned_bytes(job: TrainJob, plan: Plan, micro_batch: int) -> int:
    """What `plan`, which is of the micro-batch in `job`, says of a smaller one."""
    return plan.memory_bytes["total"] - (job.train.per_device_train_batch_size - micro_batch) * plan.row_bytes


def smaller_micro_batch(job: TrainJob, plan: Plan, micro_batch: int, room: int | None) -> int:
    """The most rows of a forward pass that fit into `room` bytes and are at most half of `micro_batch`, of which a step
    has a whole number; 0 where not one row fits."""
    own, most = job.train.per_device_train_batch_size, micro_batch // 2
    if room is not None:
        total = plan.memory_bytes["total"]
        most = min(most, largest_micro_batch(total, rows=own, row_bytes=plan.row_bytes, memory_bytes=room))
    per_step = own * job.train.gradient_accumulation_steps
    return next((rows for rows in range(most, 0, -1) if per_step % rows == 0), 0)


def _planned_with(
    job: TrainJob, plan: Plan, prepared: Prepared, change: Mapping[str, Any], micro_batch: int
) -> int | None:
    """Of the job with `change`; None where that does not go with the rest of it, or cannot even be planned here."""
    if "sharding" in change and (job.resources.workers.max == 1 or plan.sharding["name"] not in ("single", "ddp")):
        return None
    try:
        changed = make_plan(job.changed(dict(change)), prepared)
    except (LmrayError, MemoryError, RuntimeError) as error:
        if not isinstance(error, LmrayError) and not is_out_of_memory(error):
            raise
        return None
    process = plan.memory_bytes["process"] - changed.memory_bytes["process"]  # this one has grown since it was planned
    return planned_bytes(job, changed, micro_batch) + process
