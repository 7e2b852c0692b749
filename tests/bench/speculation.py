"""Speculation in the native engine: how much of what is proposed is right, and how much faster answers come.

    LMRAY_BENCH_DATA=FOLDER lmray bench speculation --model FOLDER --drafts healed=FOLDER,cut=FOLDER
        [--data e2e] [--batches 1,8] [--rounds 3] [--questions 24] [--threads 1] [--out FILE]

`--model`: a whole model, such as one that `lmray bench prune --keep` tuned for the task. `--drafts`: names and folders
of smaller models with the same tokens. Contenders are `none`, `prompt_lookup`, and each draft; greedy answers to
held-out questions, the same for all: the share of answers that are those of `none` is told, 1 in float32. Contenders
take turns within one process; tokens a second of its CPU time, medians over rounds, and as ratio to `none` of the same
round.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmray.artifacts.files import write_atomic
from lmray.engines._paged import PagedStepper
from lmray.engines._speculation.draft import Draft
from lmray.engines._speculation.prompt_lookup import PromptLookup
from lmray.engines.base import Request, Sampling
from lmray.engines.native import Native
from lmray.errors import LmrayError
from lmray.models.load import load_empty_model, load_model, load_tokenizer, stop_token_ids
from lmray.models.precision import resolve_dtype
from lmray.models.source import find_model

sys.path.insert(0, str(Path(__file__).resolve().parent))
from machine import describe
from prune_data import DATA, QUESTIONS, evenly, read_rows, write_data

MAX_LENGTH = 1024
Prompts = Sequence[tuple[int, ...]]


@dataclass
class Run:
    """What one contender did with all questions once."""

    tokens: int
    seconds: float
    answers: list[list[int]]
    told: dict[str, Any]
    """What the engine says of its speculation."""

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds


def prompts_of(data: str, folder: Path, count: int, tokenizer: Any) -> Prompts:
    """Held-out questions, as the model reads them."""
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "data"
        write_data(data, folder / DATA[data].folder, target, limit=count)
        rows = evenly(read_rows(target / QUESTIONS), count)
    asked = ([{"role": "user", "content": row["prompt"]}] for row in rows)
    return [tuple(tokenizer.apply_chat_template(one, add_generation_prompt=True)["input_ids"]) for one in asked]


def answer(core: PagedStepper, prompts: Prompts, batch: int, max_new_tokens: int, salt: str) -> Run:
    """Greedy answers, `batch` at a time; `salt`: no prompt is found in the cache."""
    answers: list[list[int]] = [[] for _ in prompts]
    start = time.process_time()
    for place in range(0, len(prompts), batch):
        for index in range(place, min(place + batch, len(prompts))):
            core.add(Request(f"{salt} {index}", prompts[index], Sampling(max_new_tokens), cache_salt=salt))
        while core.busy:
            for request_id, event in core.step():
                if isinstance(event, LmrayError):
                    raise event
                if event.token_id is not None:
                    answers[int(request_id.split()[1])].append(event.token_id)
    seconds = time.process_time() - start
    return Run(sum(map(len, answers)), seconds, answers, core.stats().get("speculation", {}))


def contenders(model: Any, stops: tuple[int, ...], batch: int, drafts: dict[str, str]) -> dict[str, PagedStepper]:
    """By name, each with caches of its own around the same weights."""
    ways: dict[str, Any] = {"none": None, "prompt_lookup": PromptLookup()}
    ways |= {name: Draft(model=folder) for name, folder in drafts.items()}
    found = {}
    for name, way in ways.items():
        config = Native(max_batch_size=batch, max_length=MAX_LENGTH, speculation=way)
        core = config.make_stepper(model, stop_token_ids=stops)
        assert isinstance(core, PagedStepper)
        found[name] = core
    return found


def line(name: str, batch: int, runs: Sequence[Run], plain: Sequence[Run], size: str) -> str:
    """Of a table: a contender of this `size` at a batch size, its runs and those of `none` in the same rounds."""
    ratio = statistics.median(one.speed / other.speed for one, other in zip(runs, plain, strict=True))
    same = statistics.fmean(
        a == b for one, other in zip(runs, plain, strict=True) for a, b in zip(one.answers, other.answers, strict=True)
    )
    told = runs[-1].told
    accepted = f"{told['acceptance']:.0%} of {told['proposed']}" if told.get("proposed") else ""
    active = {True: "yes", False: "no"}.get(told.get("active", ""), "")
    speed = statistics.median(one.speed for one in runs)
    parts = [name, size, str(batch), f"{speed:.1f}", f"{ratio:.2f}x", accepted, active, f"{same:.0%}"]
    return f"| {' | '.join(parts)} |"


def main() -> None:
    args = _arguments()
    data = Path(os.environ.get("LMRAY_BENCH_DATA", ""))
    if not (data / DATA[args.data].folder).is_dir():
        raise SystemExit(f"set LMRAY_BENCH_DATA to the folder that holds {DATA[args.data].folder}/")
    try:
        folder = find_model(args.model).folder
        args.drafts = {name: str(find_model(source).folder) for name, source in args.drafts.items()}
    except LmrayError as error:
        raise SystemExit(str(error)) from None
    dtype = resolve_dtype(args.dtype, "cpu")[0]
    model: Any = load_model(folder, dtype).requires_grad_(False)
    tokenizer = load_tokenizer(folder)
    prompts = prompts_of(args.data, data, args.questions, tokenizer)
    stops, new = stop_token_ids(model, tokenizer), DATA[args.data].max_new_tokens
    sizes = {name: f"{load_empty_model(Path(one)).num_parameters() / 1e6:.1f} M" for name, one in args.drafts.items()}
    lines = ["| proposer | its weights | batch | tokens/s | ratio | accepted | pays | same answers |", "|---" * 8 + "|"]
    described = describe(args.threads)  # sets the number of threads
    for batch in args.batches:
        lines += measured(
            contenders(model, stops, batch, args.drafts),
            lambda core, salt, batch=batch: answer(core, prompts, batch, new, salt),
            rounds=args.rounds,
            say=lambda name, runs, plain, batch=batch: line(name, batch, runs, plain, sizes.get(name, "")),
        )
    command = shlex.join(["lmray", "bench", "speculation", *sys.argv[1:]])
    text = f"\n## Tokens guessed ahead, {time.strftime('%Y-%m-%d')}\n\n`{command}`\n\n"
    text += f"{args.data}, {len(prompts)} questions, {dtype}, {args.rounds} rounds; {described}\n\n" + "\n".join(lines)
    print(text)
    if args.out:
        before = args.out.read_text(encoding="utf-8") if args.out.is_file() else "# Results\n"
        write_atomic(args.out, f"{before}{text}\n")


def measured(
    cores: dict[str, PagedStepper],
    run: Callable[[PagedStepper, str], Run],
    *,
    rounds: int,
    say: Callable[[str, Sequence[Run], Sequence[Run]], str],
) -> list[str]:
    """A line each. The order turns from round to round; one round before them is not counted."""
    runs: dict[str, list[Run]] = {name: [] for name in cores}
    for number in range(rounds + 1):
        for name in list(cores)[:: 1 if number % 2 else -1]:
            runs[name].append(run(cores[name], f"round-{number}"))
            print(f"round {number}, {name}: {runs[name][-1].speed:.1f} tokens/s", file=sys.stderr, flush=True)
    counted = {name: its[1:] for name, its in runs.items()}
    return [say(name, its, counted["none"]) for name, its in counted.items()]


def _arguments() -> argparse.Namespace:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="lmray bench speculation", description=__doc__, formatter_class=kind)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--drafts", type=_named, default={}, help="NAME=FOLDER, comma-separated")
    parser.add_argument("--data", choices=DATA, default="e2e")
    parser.add_argument("--batches", type=lambda text: [int(part) for part in text.split(",")], default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="Markdown file to append the table to")
    return parser.parse_args()


def _named(text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name and source for name, _, source in pairs) or len({name for name, _, _ in pairs}) < len(pairs):
        raise ValueError(text)
    return {name: source for name, _, source in pairs}


if __name__ == "__main__":
    main()
