"""Training steps against the peers: real tokens/s and peak memory, LoRA r=8 on all linear layers, on the CPU.

    LMRAY_BENCH_DATA=FOLDER lmray bench train [--data e2e] [--steps 14] [--rounds 3] [--contenders "lmray,TRL default"]

All contenders take the same rows in the same order and supervise the same answers (TRL also the line end behind each,
which is why its first loss is lower). Real tokens are counted, padding is not. A step's time includes batching;
the first two steps are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lmray.artifacts.files import write_atomic
from lmray.data.base import Example
from lmray.data.tokenise import tokenise
from lmray.models.load import load_tokenizer
from lmray.models.source import find_model

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from environments import peer_python  # noqa: E402
from machine import describe, gemm_flops  # noqa: E402

WARM_UP = 2
SYSTEM = "You are a helpful assistant."
"""Given in every row, so that no contender's template adds one of its own."""
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lmray": ("lmray", {}),
    "lmray run": ("lmray_run", {}),
    "lmray plain kernels": ("lmray", {"kernels": "plain"}),
    "lmray fp32": ("lmray", {"dtype": "float32"}),
    "TRL default": ("trl", {}),
    "TRL fp32": ("trl", {"dtype": "float32", "bf16": False, "gradient_checkpointing": False}),
    "TRL bf16": ("trl", {"dtype": "bfloat16", "bf16": True, "gradient_checkpointing": False}),
    "TRL bf16 chunked loss": (
        "trl",
        {"dtype": "bfloat16", "bf16": True, "gradient_checkpointing": False, "loss_type": "chunked_nll"},
    ),
    "LLaMA-Factory default": ("llamafactory", {}),
    "LLaMA-Factory bf16": ("llamafactory", {"bf16": True, "disable_gradient_checkpointing": True}),
}
"""Shown name -> framework and its options; options of lmray are the model's. `lmray run` is the whole command with its
own Ray, the other contenders are their steps alone in one process."""


@dataclass(frozen=True)
class Measured:
    """One process of one contender."""

    tokens_per_s: float
    median_step_s: float
    first_loss: float
    peak_bytes: int
    start_s: float
    """From the start of the process to the end of its first step."""


def read_e2e(folder: Path) -> list[list[dict[str, str]]]:
    rows = _rows(folder / "e2e_nlg" / "dev.jsonl")
    return [_conversation("Say this in English: " + row["mr"], row["ref"]) for row in rows]


def read_pubmedqa(folder: Path) -> list[list[dict[str, str]]]:
    rows = _rows(folder / "pubmedqa" / "train.jsonl")
    return [_conversation(f"{_text(row['context'])}\n\n{row['question']}", row["long_answer"]) for row in rows]


def _rows(path: Path) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else " ".join(map(str, value))


def _conversation(question: str, answer: str) -> list[dict[str, str]]:
    turns = (("system", SYSTEM), ("user", question), ("assistant", answer))
    return [{"role": role, "content": content} for role, content in turns]


DATA = {"e2e": read_e2e, "pubmedqa": read_pubmedqa}


def measure(name: str, settings: dict[str, Any], tokens: list[int]) -> Measured:
    """One round of contender `name`; `tokens` are the real tokens of each step."""
    framework, options = CONTENDERS[name]
    is_own = framework.startswith("lmray")
    python = Path(sys.executable) if is_own else peer_python(framework)
    threads = str(settings["threads"])
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "LMRAY_BENCH_DATA")}
    env |= {"OMP_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    env |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(HERE.parents[1]) if is_own else ""}
    script = HERE / "contenders" / f"{framework}_steps.py"
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        json.dump(settings | {"options": options}, file)
        file.flush()
        started = time.time()
        done = subprocess.run(
            [str(python), str(script), file.name], env=env, capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    seconds = found["seconds"][WARM_UP:]
    return Measured(
        tokens_per_s=sum(found.get("tokens", tokens)[WARM_UP:]) / sum(seconds),
        median_step_s=statistics.median(seconds),
        first_loss=float(found["losses"][0]),
        peak_bytes=found["peak_bytes"],
        start_s=found["first_step_at"] - started,
    )


class Turns:
    """What was measured, by round and contender; with a file, each is appended to it at once and never made again."""

    def __init__(self, path: Path | None, key: list[Any]):
        """`key` (JSON types): the settings that measurements belong to."""
        self.path, self.key = path, key
        lines = _rows(path) if path and path.is_file() else []
        kept = [line for line in lines if line["key"] == key]
        self.made = {(line["round"], line["contender"]): Measured(**line["measured"]) for line in kept}

    def once(self, turn: int, name: str, make: Callable[[], Measured]) -> Measured:
        if (turn, name) not in self.made:
            self.made[turn, name] = one = make()
            if self.path:
                line = {"key": self.key, "round": turn, "contender": name, "measured": asdict(one)}
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
        return self.made[turn, name]


def main() -> None:
    arguments = _arguments()
    folder = Path(os.environ.get("LMRAY_BENCH_DATA", ""))
    if not (folder / "e2e_nlg").is_dir():
        raise SystemExit("set LMRAY_BENCH_DATA to the folder that holds e2e_nlg/ and pubmedqa/")
    model = find_model("smollm2-135m", None)
    tokenizer = load_tokenizer(model.folder)
    count = arguments.steps * arguments.batch_size
    conversations = DATA[arguments.data](folder)[:count]
    lengths = [tokenise(tokenizer, Example(tuple(one), str(index))) for index, one in enumerate(conversations)]
    size = arguments.batch_size
    tokens = [sum(map(len, lengths[first : first + size])) for first in range(0, count, size)]
    supervised = sum(one.num_supervised for one in lengths) / sum(tokens)
    names = arguments.contenders.split(",") if arguments.contenders else list(CONTENDERS)
    with tempfile.TemporaryDirectory() as place:
        data = Path(place) / "bench.jsonl"
        data.write_text("".join(json.dumps({"messages": one}) + "\n" for one in conversations), encoding="utf-8")
        settings = {"model": str(model.folder), "data": str(data), "learning_rate": 1e-4}
        settings |= {"steps": arguments.steps, "batch_size": size, "threads": arguments.threads}
        turns = Turns(arguments.rows, [arguments.data, arguments.steps, size, arguments.threads])
        for turn in range(arguments.rounds):
            for name in names:
                one = turns.once(turn, name, lambda name=name: measure(name, settings, tokens))
                print(f"round {turn + 1}  {name}: {one.tokens_per_s:.0f} tokens/s", file=sys.stderr, flush=True)
    found = {name: [turns.made[turn, name] for turn in range(arguments.rounds)] for name in names}
    flops = _flops_per_token(supervised)
    head = (
        f"{arguments.data}, {arguments.steps} steps of {size} rows, {sum(tokens)} tokens ({supervised:.0%} "
        f"supervised), {arguments.rounds} rounds; {describe(arguments.threads)}"
    )
    command = shlex.join(["lmray", "bench", "train", *sys.argv[1:]])
    text = f"\n## Training steps, {time.strftime('%Y-%m-%d')}\n\n`{command}`\n\n{head}\n\n"
    text += table(found, flops, gemm_flops("bfloat16", arguments.threads))
    print(text)
    if arguments.out:
        before = arguments.out.read_text(encoding="utf-8") if arguments.out.is_file() else "# Results\n"
        write_atomic(arguments.out, before + text)


def _flops_per_token(supervised: float) -> float:
    """Of SmolLM2-135M with frozen weights: forward and the inputs' gradients, 4 a weight; the head where supervised."""
    layers, head = 106.2e6, 28.3e6
    return 4 * (layers + supervised * head)


def table(found: dict[str, list[Measured]], flops: float, peak_flops: float) -> str:
    """Medians over the rounds; speeds with their range, and as a ratio to TRL's defaults where those ran."""
    speeds = {name: statistics.median(one.tokens_per_s for one in rounds) for name, rounds in found.items()}
    base = speeds.get("TRL default") or next(iter(speeds.values()))
    lines = [
        "| | tokens/s (range) | ratio | MFU | first loss | peak memory | start to first step |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, rounds in found.items():
        low, high = (pick(one.tokens_per_s for one in rounds) for pick in (min, max))
        memory = statistics.median(one.peak_bytes for one in rounds) / 2**30
        start = statistics.median(one.start_s for one in rounds)
        lines.append(
            f"| {name} | {speeds[name]:.0f} ({low:.0f}-{high:.0f}) | {speeds[name] / base:.2f} | "
            f"{speeds[name] * flops / peak_flops:.1%} | {rounds[0].first_loss:.4f} | {memory:.2f} GiB | {start:.1f} s |"
        )
    return "\n".join(lines) + "\n"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="lmray bench train", description=__doc__)
    parser.add_argument("--data", choices=DATA, default="e2e")
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contenders", help=f"comma-separated, of: {', '.join(CONTENDERS)}")
    parser.add_argument("--rows", type=Path, help="JSON lines to append each measurement to, and to go on from")
    parser.add_argument("--out", type=Path, help="Markdown file to append the table to")
    return parser.parse_args()


if __name__ == "__main__":
    main()
