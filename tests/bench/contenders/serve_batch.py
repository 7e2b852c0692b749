"""One contender of `lmray bench serve`: prints how long a batch of prompts and its answers took."""

from __future__ import annotations

import json
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from lmray.engines._adapter_folder import read_adapter_folder
from lmray.engines.base import Request, Sampling
from lmray.engines.native import Native
from lmray.models.load import load_model

Timed = tuple[float, float]
"""Seconds to the first token of the last request, and to the end."""
WARM_UP_TOKENS = 4
RANK = 16


def write_adapters(model: Any, root: Path, count: int) -> list[Path]:
    """Folders of `count` random adapters; `model` is given back as it came."""
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    folders = []
    for index in range(count):
        torch.manual_seed(index)
        attached = get_peft_model(model, config)
        for name, parameter in attached.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        attached.save_pretrained(str(root / str(index)))
        folders.append(root / str(index))
        attached.unload()
    return folders


def run_engine(model: Any, prompts: list[tuple[int, ...]], settings: dict[str, Any], folders: list[Path]) -> Callable:
    longest = len(prompts[0]) + settings["num_out"]
    config = Native(max_batch_size=len(prompts), max_adapters=len(folders), max_length=longest)
    stepper = config.make_stepper(model.requires_grad_(False), stop_token_ids=())
    for index, folder in enumerate(folders):
        stepper.adapters.add(str(index), read_adapter_folder(folder, stepper.adapters.base))
    asks_base = not folders or settings["contender"] != "lmray"
    rounds = iter(range(2**30))

    def run(num_out: int) -> Timed:
        turn, start, first, waiting = next(rounds), time.perf_counter(), 0.0, set(range(len(prompts)))
        for index, prompt in enumerate(prompts):
            adapter = None if asks_base else str(index % len(folders))
            # another salt each round, so that no prompt is found in the cache
            request = Request(str(index), prompt, Sampling(num_out), adapter, cache_salt=str(turn))
            stepper.add(request)
        while stepper.busy:
            told = stepper.step()
            if waiting:
                waiting -= {int(request_id) for request_id, _ in told}
                first = time.perf_counter() - start
        return first, time.perf_counter() - start

    return run


def run_generate(model: Any, prompts: list[tuple[int, ...]], folders: list[Path]) -> Callable:
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

    def run(num_out: int) -> Timed:
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(ids, max_new_tokens=1, min_new_tokens=1, **told)
            first = time.perf_counter() - start
            start = time.perf_counter()
            model.generate(ids, max_new_tokens=num_out, min_new_tokens=num_out, **told)
        return first, time.perf_counter() - start

    return run


def main() -> None:
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    model: Any = load_model(Path(settings["model"]), "bfloat16")
    source = random.Random(0)
    vocabulary = model.config.vocab_size
    prompts = [tuple(source.randrange(vocabulary) for _ in range(settings["num_in"])) for _ in range(settings["batch"])]
    with tempfile.TemporaryDirectory() as root:
        folders = write_adapters(model, Path(root), settings["adapters"])
        is_own = settings["contender"].startswith("lmray")
        run = run_engine(model, prompts, settings, folders) if is_own else run_generate(model, prompts, folders)
        run(WARM_UP_TOKENS)
        first, total = run(settings["num_out"])
    speed = settings["batch"] * (settings["num_out"] - 1) / (total - first)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"prefill_s": first, "decode_tokens_per_s": speed, "peak_bytes": peak}))


if __name__ == "__main__":
    main()
