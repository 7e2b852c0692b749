"""Serving against the peers: generated tokens/s of SmolLM2-135M, with 0, 1, 4 or 16 adapters in a batch.

    lmray bench serve [--batches 1,8,16,32] [--adapters 0,1,4,16,64] [--rounds 3] [--contenders lmray,generate]
        [--dtype bfloat16]

Every request has 128 tokens of random ids in and 64 out; adapters have rank 16 on all linear layers and random weights,
and requests take turns with them.

- `lmray` is the engine's core in one process, which reads the prompts within the same steps; all requests come at once.
- `lmray compiled` is the same with `engine.torch_compile`.
- `lmray merged` has one adapter merged into the model.
- `lmray base beside adapters` asks the base model while the adapters are loaded.
- `lmray in turn` keeps the batch full: whenever a request ends another comes, with the next adapter, of which there may
  be more than requests in a batch. Its speed is of all tokens with the prompts that are read meanwhile; its time to the
  first token is the median of the requests that came in another's place.
- `generate` is `transformers`' own (with PEFT's per-row `adapter_names` for adapters), one static batch.
- `continuous batching` is that of `transformers`, which knows no adapters.

Where requests come at once, the first token is that of the last request, and the speed is of all tokens after it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from lmray.artifacts.files import write_atomic
from lmray.models.precision import resolve_dtype
from lmray.models.source import find_model

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from machine import describe  # noqa: E402

CONTENDERS: dict[str, Callable[[int, int], bool]] = {
    "lmray": lambda batch, distinct: distinct <= batch,
    "lmray compiled": lambda batch, distinct: distinct <= batch,
    "lmray merged": lambda batch, distinct: distinct == 1,
    "lmray base beside adapters": lambda batch, distinct: 0 < distinct <= batch,
    "lmray in turn": lambda batch, distinct: batch > 1,
    "generate": lambda batch, distinct: distinct <= batch,
    "continuous batching": lambda batch, distinct: distinct == 0,
}
"""For which batch sizes and distinct adapters each is measured."""
NUM_IN, NUM_OUT = 128, 64


@dataclass(frozen=True)
class Measured:
    """One process of one contender."""

    first_token_s: float
    tokens_per_s: float
    peak_bytes: int


def cases(batches: list[int], adapters: list[int], names: list[str]) -> list[tuple[str, int, int]]:
    """Contender, batch size, distinct adapters."""
    every = itertools.product(batches, adapters, names)
    return [(name, batch, distinct) for batch, distinct, name in every if CONTENDERS[name](batch, distinct)]


def measure(settings: dict[str, object]) -> Measured:
    """One process: what it prints last is what it measured."""
    env = os.environ | {"OMP_NUM_THREADS": str(settings["threads"]), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    env |= {"PYTHONPATH": str(HERE.parents[1]), "TOKENIZERS_PARALLELISM": "false"}
    script = HERE / "contenders" / "serve_batch.py"
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(settings)], env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{settings} failed:\n{done.stderr[-3000:]}")
    return Measured(**json.loads(done.stdout.strip().splitlines()[-1]))


class Turns:
    """What was measured, by case and round; with a file, each is appended to it at once and never made again."""

    def __init__(self, path: Path | None):
        self.path = path
        if path:  # what is measured can be kept
            path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path and path.is_file() else []
        read = [json.loads(line) for line in lines]
        self.made = {json.dumps(line["case"]): Measured(**line["measured"]) for line in read}

    def once(self, case: dict[str, object], settings: dict[str, object]) -> Measured:
        key = json.dumps(case)
        if key not in self.made:
            self.made[key] = one = measure(settings)
            if self.path:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"case": case, "measured": asdict(one)}) + "\n")
        return self.made[key]


def table(found: dict[tuple[str, int, int], list[Measured]]) -> str:
    """Medians over the rounds, speeds with their range; ratios to the same contender's base model, for lmray's to
    `lmray`'s."""
    lines = [
        "| | batch | adapters | tokens/s (range) | of its base | first token | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    speeds = {case: statistics.median(one.tokens_per_s for one in rounds) for case, rounds in found.items()}
    for (name, batch, distinct), rounds in found.items():
        low, high = (pick(one.tokens_per_s for one in rounds) for pick in (min, max))
        own = name if name == "lmray in turn" else name.split(" ")[0]
        base = speeds.get((own, batch, 0))
        ratio = f"{speeds[name, batch, distinct] / base:.0%}" if base else ""
        first = statistics.median(one.first_token_s for one in rounds)
        memory = statistics.median(one.peak_bytes for one in rounds) / 2**30
        lines.append(
            f"| {name} | {batch} | {distinct} | {speeds[name, batch, distinct]:.0f} ({low:.0f}-{high:.0f}) | {ratio} | "
            f"{first:.2f} s | {memory:.2f} GiB |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    arguments = _arguments()
    folder = find_model("smollm2-135m", None).folder
    chosen = cases(arguments.batches, arguments.adapters, arguments.contenders)
    turns, found = Turns(arguments.rows), {case: [] for case in chosen}
    for turn in range(arguments.rounds):
        for name, batch, distinct in random.Random(turn).sample(chosen, len(chosen)):
            case = {"round": turn, "contender": name, "batch": batch, "adapters": distinct}
            case |= {"threads": arguments.threads, "tokens": [NUM_IN, arguments.num_out], "dtype": arguments.dtype}
            told = {"model": str(folder), "num_in": NUM_IN, "num_out": arguments.num_out}
            one = turns.once(case, case | told)
            found[name, batch, distinct].append(one)
            shown = f"{name}, batch {batch}, {distinct} adapters: {one.tokens_per_s:.0f} tokens/s"
            print(f"round {turn + 1}  {shown}", file=sys.stderr, flush=True)
    command = shlex.join(["lmray", "bench", "serve", *sys.argv[1:]])
    head = f"{arguments.dtype}, {NUM_IN} tokens in, {arguments.num_out} out, {arguments.rounds} rounds"
    head += f"; {describe(arguments.threads)}"
    text = f"\n## Serving, {time.strftime('%Y-%m-%d')}\n\n`{command}`\n\n{head}\n\n" + table(found)
    print(text)
    if arguments.out:
        before = arguments.out.read_text(encoding="utf-8") if arguments.out.is_file() else "# Results\n"
        write_atomic(arguments.out, before + text)


def _arguments() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(one) for one in text.split(",")]

    parser = argparse.ArgumentParser(prog="lmray bench serve", description=__doc__)
    parser.add_argument("--batches", type=numbers, default=[1, 8, 16, 32], help="requests at once, comma-separated")
    parser.add_argument(
        "--adapters", type=numbers, default=[0, 1, 4, 16, 64], help="distinct adapters, comma-separated"
    )
    parser.add_argument("--contenders", type=lambda text: text.split(","), default=list(CONTENDERS))
    parser.add_argument("--num-out", type=int, default=NUM_OUT, help="tokens generated for each request")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    dtypes = ("auto", "bfloat16", "float32")
    parser.add_argument("--dtype", choices=dtypes, default="auto", help="of all contenders; auto: as an endpoint's")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=Path, help="JSON lines to append each measurement to, and to go on from")
    parser.add_argument("--out", type=Path, help="Markdown file to append the table to")
    arguments = parser.parse_args()
    if unknown := set(arguments.contenders) - set(CONTENDERS):
        parser.error(f"unknown contenders {sorted(unknown)}; there are: {', '.join(CONTENDERS)}")
    arguments.dtype, _ = resolve_dtype(arguments.dtype, "cpu")
    return arguments


if __name__ == "__main__":
    main()
