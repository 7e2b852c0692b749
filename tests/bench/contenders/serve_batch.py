"""One contender of `lmray bench serve`: prints how long a batch of prompts and its answers took."""

from __future__ import annotations

import itertools
import json
import random
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import ContinuousBatchingConfig, GenerationConfig

from lmray.engines._adapter_folder import WEIGHTS, read_adapter_folder
from lmray.engines._paged import PagedStepper
from lmray.engines.base import Request, Sampling
from lmray.engines.native import Native
from lmray.models.load import load_model

Prompt = tuple[int, ...]
Timed = tuple[float, float]
"""Seconds to a first token, and generated tokens a second."""
WARM_UP_TOKENS = 4
RANK = 16
TURNS = 2
"""Requests that come in the place of others, for each of a batch."""


def write_adapters(model: Any, root: Path, count: int) -> list[Path]:
    """Folders of `count` random adapters; `model` is given back as it came."""
    if not count:
        return []
    first = root / "0"
    attached = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    attached.save_pretrained(str(first))
    attached.unload()
    shapes = {name: one.shape for name, one in load_file(first / WEIGHTS).items()}
    folders = [root / str(index) for index in range(count)]
    for index, folder in enumerate(folders):
        if folder != first:
            shutil.copytree(first, folder)
        source = torch.Generator().manual_seed(index)
        tensors = {name: torch.randn(shape, generator=source).mul_(0.02) for name, shape in shapes.items()}
        save_file(tensors, folder / WEIGHTS)
    return folders


def make_core(model: Any, settings: dict[str, Any], folders: list[Path]) -> PagedStepper:
    is_merged = settings["contender"] == "lmray merged"
    if is_merged:
        model = PeftModel.from_pretrained(model, folders[0], autocast_adapter_dtype=False).merge_and_unload()
    longest = settings["num_in"] + settings["num_out"]
    compiled = settings["contender"] == "lmray compiled"
    sizes: dict[str, Any] = {"max_batch_size": settings["batch"], "max_adapters": len(folders), "max_length": longest}
    config = Native(**sizes, torch_compile=compiled)
    core = config.make_stepper(model.requires_grad_(False), stop_token_ids=())
    assert isinstance(core, PagedStepper)
    core.pack()
    for index, folder in enumerate(() if is_merged else folders):
        core.adapters.add(str(index), read_adapter_folder(folder, core.adapters.base))
    return core


def adapters_of(settings: dict[str, Any], count: int) -> list[str | None]:
    """Whom `count` requests ask."""
    asks_base = settings["contender"] in ("lmray merged", "lmray base beside adapters") or not settings["adapters"]
    return [None if asks_base else str(index % settings["adapters"]) for index in range(count)]


def run_at_once(core: PagedStepper, prompts: list[Prompt], settings: dict[str, Any]) -> Callable[[int], Timed]:
    """All requests come at once."""
    salts = map(str, itertools.count())  # another each time, so that no prompt is found in the cache

    def run(num_out: int) -> Timed:
        salt, start, first, waiting = next(salts), time.perf_counter(), 0.0, set(range(len(prompts)))
        for index, (prompt, adapter) in enumerate(zip(prompts, adapters_of(settings, len(prompts)), strict=True)):
            core.add(Request(str(index), prompt, Sampling(num_out), adapter, cache_salt=salt))
        while core.busy:
            told = core.step()
            if waiting:
                waiting -= {int(request_id) for request_id, _ in told}
                first = time.perf_counter() - start
        total = time.perf_counter() - start
        return first, len(prompts) * (num_out - 1) / (total - first)

    return run


def run_in_turn(core: PagedStepper, prompts: list[Prompt], settings: dict[str, Any]) -> Callable[[int], Timed]:
    """As many requests run as `batch` says, and whenever one ends another comes: the first end one after the other.
    Timed from the first that comes in another's place to the last."""
    salts = map(str, itertools.count())
    batch = settings["batch"]

    def run(num_out: int) -> Timed:
        salt, adapters = next(salts), adapters_of(settings, len(prompts))
        lengths = [
            max(1, num_out * (index + 1) // batch) if index < batch else num_out for index in range(len(prompts))
        ]
        came: dict[str, float] = {}
        waits, num_tokens, start, end = [], 0, 0.0, 0.0
        coming = iter(range(len(prompts)))
        for index in itertools.islice(coming, batch):
            core.add(Request(str(index), prompts[index], Sampling(lengths[index]), adapters[index], cache_salt=salt))
        while core.busy:
            told = core.step()
            now = time.perf_counter()
            num_tokens += len(told) if start and not end else 0
            for request_id, outcome in told:
                if request_id in came:
                    waits.append(now - came.pop(request_id))
                if outcome.finish_reason is None or end:
                    continue
                index = next(coming, None)
                if index is None:
                    end = now
                    continue
                start, came[str(index)] = start or now, now
                request = Request(
                    str(index), prompts[index], Sampling(lengths[index]), adapters[index], cache_salt=salt
                )
                core.add(request)
        return statistics.median(waits), num_tokens / (end - start)

    return run


def run_generate(model: Any, prompts: list[Prompt], folders: list[Path]) -> Callable[[int], Timed]:
    told: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for index, folder in enumerate(folders):
        if index == 0:
            model = PeftModel.from_pretrained(model, folder, adapter_name="0", autocast_adapter_dtype=False)
        else:
            model.load_adapter(folder, adapter_name=str(index), autocast_adapter_dtype=False)
    if folders:
        told["adapter_names"] = [str(index % len(folders)) for index in range(len(prompts))]
    ids = torch.tensor(prompts)
    told["attention_mask"] = torch.ones_like(ids)
    model.eval()
    return _timed(lambda num_out: model.generate(ids, max_new_tokens=num_out, min_new_tokens=num_out, **told), prompts)


def run_continuous(model: Any, prompts: list[Prompt], settings: dict[str, Any]) -> Callable[[int], Timed]:
    """Continuous batching of `transformers`, with room for what the requests need."""
    longest = settings["num_in"] + settings["num_out"]
    generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=longest)
    page = 256
    batching = ContinuousBatchingConfig(
        page_size=page, num_blocks=len(prompts) * -(-longest // page) + 2, max_batch_tokens=len(prompts) * longest
    )
    inputs = [list(prompt) for prompt in prompts]

    def answer(num_out: int) -> None:
        told = model.generate_batch(inputs, generation, batching, max_new_tokens=num_out)
        lengths = {len(one.generated_tokens) for one in told.values()}
        if len(told) != len(prompts) or lengths != {num_out}:
            raise SystemExit(f"{len(told)} answers of {lengths} tokens, not {len(prompts)} of {num_out}")

    return _timed(answer, prompts)


def _timed(answer: Callable[[int], Any], prompts: list[Prompt]) -> Callable[[int], Timed]:
    """Of a batch that cannot be watched: its prompts' time is that of one token."""

    def run(num_out: int) -> Timed:
        start = time.perf_counter()
        answer(1)
        first = time.perf_counter() - start
        start = time.perf_counter()
        answer(num_out)
        total = time.perf_counter() - start
        return first, len(prompts) * (num_out - 1) / (total - first)

    return run


def main() -> None:
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    model: Any = load_model(Path(settings["model"]), settings["dtype"])
    source = random.Random(0)
    vocabulary, in_turn = model.config.vocab_size, settings["contender"] == "lmray in turn"
    count = settings["batch"] * (1 + TURNS * in_turn)
    prompts = [tuple(source.randrange(vocabulary) for _ in range(settings["num_in"])) for _ in range(count)]
    with tempfile.TemporaryDirectory() as root:
        folders = write_adapters(model, Path(root), settings["adapters"])
        if settings["contender"].startswith("lmray"):
            core = make_core(model, settings, folders)
            run = (run_in_turn if in_turn else run_at_once)(core, prompts, settings)
        elif settings["contender"] == "generate":
            run = run_generate(model, prompts, folders)
        else:
            run = run_continuous(model, prompts, settings)
        run(WARM_UP_TOKENS)
        first, speed = run(settings["num_out"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"first_token_s": first, "tokens_per_s": speed, "peak_bytes": peak}))


if __name__ == "__main__":
    main()
