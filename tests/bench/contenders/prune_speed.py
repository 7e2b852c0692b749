"""Speed of a model in plain `transformers`: a process of its own that measures once for every line it is sent.

Run as `python prune_speed.py FOLDER DTYPE THREADS QUICK`. Answers each line with one of JSON: tokens a second of this
process's CPU time, of a prompt of 256 tokens and of 64 tokens after it, for 1 and 8 rows; and its peak memory.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM

from lmray.train.peak import peak_memory_bytes

PREFILL, DECODE = 256, 64


@torch.no_grad()
def measure(model, batch_size: int, prefill: int, decode: int) -> tuple[float, float]:
    """Tokens a CPU second: of the prompt, and after it."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (batch_size, prefill), generator=draw)
    start = time.process_time()
    out = model(ids, use_cache=True, logits_to_keep=1)
    middle = time.process_time()
    for _ in range(decode):
        token = out.logits[:, -1:].argmax(-1)
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
    end = time.process_time()
    return batch_size * prefill / (middle - start), batch_size * decode / (end - middle)


def main() -> None:
    folder, dtype, threads, quick = sys.argv[1:]
    torch.set_num_threads(int(threads))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    lengths = (PREFILL // 4, DECODE // 8) if quick == "1" else (PREFILL, DECODE)
    measure(model, 1, 32, 4)  # first calls allocate
    for _ in sys.stdin:
        found = {}
        for batch_size in (1, 8):
            speeds = measure(model, batch_size, *lengths)
            found |= {f"{name}_{batch_size}": speed for name, speed in zip(("prefill", "decode"), speeds, strict=True)}
        print(json.dumps(found | {"peak_bytes": peak_memory_bytes("cpu")["train.peak_memory_bytes"]}), flush=True)


if __name__ == "__main__":
    main()
