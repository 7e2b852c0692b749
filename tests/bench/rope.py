"""Perplexity beyond the trained length: positions scaled by each type against none, on long texts of one subject.

    lmray bench rope [--model smollm2-135m] [--times 2] [--windows 1] [--types none,linear,dynamic,yarn,llama3]

A window of the Python language reference (`python:pydoc_data.topics`), `--times` as long as the model's own positions,
is read at once; the loss is shown by where in the window its tokens stand. Nothing is trained: a type that is to be
used for longer contexts should lose little within the trained length and little beyond it. `--times 4` takes about
three times as long as `--times 2`.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch

from lmray.data.examples import read_examples
from lmray.data.spec import DataSource, DataSpec
from lmray.data.stream import Stream
from lmray.data.tokenise import tokenise
from lmray.models.load import load_config, load_model, load_tokenizer
from lmray.models.precision import resolve_dtype
from lmray.models.rope import RopeScaling, num_positions
from lmray.models.source import find_model
from lmray.ops.cross_entropy import cross_entropy_per_token

sys.path.insert(0, str(Path(__file__).resolve().parent))
from machine import describe

SOURCE = "python:pydoc_data.topics"
TYPES = ("none", "linear", "dynamic", "yarn", "llama3")
CHUNK = 1024
"""Tokens whose logits are there at a time."""
PARTS = 4
"""Stretches of a window that are told apart."""


@torch.no_grad()
def losses(folder: Path, ids_T: torch.Tensor, dtype: str, scaling: RopeScaling | None) -> torch.Tensor:
    """Loss in nats of every token of `ids_T` but the first."""
    model = load_model(folder, dtype, rope_scaling=scaling)
    hidden_TD = model.base_model(input_ids=ids_T[None], use_cache=False).last_hidden_state[0, :-1]
    head = model.get_output_embeddings()
    assert head is not None
    pairs = zip(hidden_TD.split(CHUNK), ids_T[1:].split(CHUNK), strict=True)
    return torch.cat([cross_entropy_per_token(head(hidden), targets) for hidden, targets in pairs])


def windows(folder: Path, length: int, count: int) -> list[torch.Tensor]:
    """The first `count` windows of `length` tokens of the joined documents."""
    tokenizer, spec = load_tokenizer(folder, chat=False), DataSpec(train=(DataSource(source=SOURCE),))
    documents = [tokenise(tokenizer, example) for example in read_examples(spec).train]
    rows = [row for row in Stream(documents, max_length=length, apart=False)[:count] if len(row[0]) == length]
    if not rows:
        raise SystemExit(f"{SOURCE} has fewer than {length} tokens: lower --times")
    return [torch.from_numpy(row[0].input_ids).long() for row in rows]


def table(folder: Path, args: argparse.Namespace) -> str:
    """One row a type: perplexity by stretch of the window, over all of it, and the time it took."""
    positions = num_positions(load_config(folder))
    assert positions is not None
    dtype, _ = resolve_dtype("auto", "cpu")
    rows = windows(folder, int(positions * args.times), args.windows)
    length = len(rows[0])
    ends = [length * part // PARTS for part in range(PARTS + 1)]
    names = [f"tokens {start} to {end}" for start, end in pairwise(ends)]
    lines = [f"| positions | {' | '.join(names)} | all | seconds |", "|---" * (PARTS + 3) + "|"]
    for rope_type in args.types.split(","):
        fields = {"rope_type": rope_type, "factor": args.times}
        scaling = None if rope_type == "none" else RopeScaling.model_validate(fields)
        begin = time.perf_counter()
        found = torch.stack([losses(folder, ids_T, dtype, scaling) for ids_T in rows])
        means = [float(part.mean()) for part in found.tensor_split([end - 1 for end in ends[1:-1]], dim=1)]
        cells = [f"{math.exp(mean):.2f}" for mean in (*means, float(found.mean()))]
        lines.append(f"| {rope_type} | {' | '.join(cells)} | {time.perf_counter() - begin:.0f} |")
        print(lines[-1], file=sys.stderr, flush=True)
    what = f"{args.model}, {positions} own positions, {len(rows)} window(s) of {length} tokens, {dtype}"
    head = f"{what}; {describe(torch.get_num_threads())}"
    return f"{head}\n\n" + "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--times", type=float, default=2.0, help="Length of the windows in the model's own positions.")
    parser.add_argument("--windows", type=int, default=1)
    parser.add_argument("--types", default=",".join(TYPES))
    args = parser.parse_args()
    print(table(find_model(args.model).folder, args))


if __name__ == "__main__":
    main()
