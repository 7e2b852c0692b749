"""What the plan says of the data: lengths, the supervised share, the tokens that answers end with and rows begin with,
and examples as the model sees them."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from lmray.data.table import IGNORED, Table, Tokenised
from lmray.train.prepare import Prepared

PERCENTILES = {"tokens_median": 50, "tokens_p90": 90, "tokens_p95": 95, "tokens_p99": 99, "tokens_max": 100}
MANY_DROPPED = 0.05
"""Share of examples dropped or cut from which on it is a warning."""
FEW_SUPERVISED = 0.01


def data_facts(ready: Prepared, *, max_length: int) -> dict[str, Any]:
    """Counts of examples, rows and tokens, and the special tokens around answers; JSON types."""
    examples = ready.train.examples
    lengths = np.sort(examples.lengths)
    tokens, supervised = int(lengths.sum()), int(examples.supervised.sum())
    percentiles = {name: int(lengths[-(-len(lengths) * share // 100) - 1]) for name, share in PERCENTILES.items()}
    return {
        "digest": ready.digest,
        "formats": list(ready.examples.formats),
        "train_examples": len(examples),
        "eval_examples": len(ready.eval.examples),
        **({"search_examples": len(ready.search.examples)} if ready.search_rows else {}),
        **({"held_out_too": ready.num_held_out_too} if ready.num_held_out_too else {}),
        "dropped": ready.train.num_dropped + ready.eval.num_dropped,
        "truncated": ready.train.num_truncated + ready.eval.num_truncated,
        "empty": ready.train.num_empty + ready.eval.num_empty,
        "empty_rows": [*ready.train.empty_rows, *ready.eval.empty_rows],
        "max_length": max_length,
        "train_tokens": tokens,
        "mixture": _mixture(ready),
        "eval_tokens": int(ready.eval.examples.lengths.sum()),
        "supervised_tokens": supervised,
        "supervised_share": round(supervised / tokens, 4),
        **percentiles,
        "rows": len(ready.rows),
        "stop": _stop_facts(ready.tokenizer, examples),
        "bos": _bos_facts(ready.tokenizer, examples),
    }


def _mixture(ready: Prepared) -> dict[str, int]:
    """Tokens an epoch by source, where there are several."""
    table, given = ready.train.examples, ready.examples.mixture
    if len(given) < 2:
        return {}
    ends = np.cumsum([count for _, count in given])
    tokens = np.bincount(np.searchsorted(ends, table.sources, side="right"), table.lengths, minlength=len(ends))
    found: dict[str, int] = {}
    for (source, _), count in zip(given, tokens, strict=True):
        found[source] = found.get(source, 0) + int(count)
    return found


def _stop_facts(tokenizer: Any, examples: Table) -> dict[str, Any]:
    """The stop token, and how many examples have it as their last supervised token."""
    stop = tokenizer.eos_token_id
    ending = int(np.count_nonzero(examples.column(lambda part: part.borders_M3[:, 2]) == stop))
    return {"token": tokenizer.eos_token, "id": stop, "examples": ending, "share": round(ending / len(examples), 4)}


def _bos_facts(tokenizer: Any, examples: Table) -> dict[str, Any]:
    """The token for the beginning of text: how many examples start with it, and how many with two of them."""
    bos, counts = tokenizer.bos_token_id, (0, 0)
    if bos is not None:
        first, second = (
            examples.column(lambda part, place=place: part.borders_M3[:, place]) == bos for place in (0, 1)
        )
        counts = int(first.sum()), int((first & second).sum())
    return {"token": tokenizer.bos_token, "id": bos, "examples": counts[0], "doubled": counts[1]}


def data_warnings(facts: dict[str, Any]) -> list[str]:
    """What of the data would train a bad model while the loss looks well."""
    count, warnings = facts["train_examples"], []
    if "held_out_too" in facts:
        found = f"{facts['held_out_too']} training rows are held out, too, word for word, and left out of training"
        warnings.append(found)
    unstopped = count - facts["stop"]["examples"]
    if unstopped:
        warnings.append(f"{unstopped} of {count} examples do not end with the stop token: raise `data.max_length`")
    if facts["bos"]["doubled"]:
        warnings.append(f"{facts['bos']['doubled']} of {count} examples begin with two {facts['bos']['token']} tokens")
    lost = facts["dropped"] + facts["truncated"]
    seen = count + facts["eval_examples"] + facts["dropped"]
    if lost > MANY_DROPPED * seen:
        warnings.append(f"{lost} of {seen} examples are over {facts['max_length']} tokens: raise `data.max_length`")
    if facts["supervised_share"] < FEW_SUPERVISED:
        warnings.append(f"only {facts['supervised_share']:.2%} of the tokens are supervised")
    return warnings


@dataclass(frozen=True)
class Piece:
    """A stretch of an example's text that is supervised throughout, or nowhere."""

    text: str
    """With control characters written out, and its middle left out where it is long."""
    supervised: bool


def preview(ready: Prepared, count: int = 2, *, max_chars: int = 400) -> list[list[Piece]]:
    """`count` training examples as the model sees them: the first, then of spread lengths; each stretch shortened to
    about `max_chars`."""
    examples = ready.train.examples
    by_length = np.argsort(examples.lengths, kind="stable").tolist()
    spread = [by_length[(place * len(by_length)) // max(count, 1)] for place in range(1, count)]
    chosen = list(dict.fromkeys([0, *spread]))[:count]
    return [_pieces(ready.tokenizer, examples[index], max_chars) for index in chosen]


def _pieces(tokenizer: Any, one: Tokenised, max_chars: int) -> list[Piece]:
    marked = zip(one.input_ids, one.labels, strict=True)
    pieces = []
    for supervised, run in groupby(marked, key=lambda pair: pair[1] != IGNORED):
        ids = [int(token) for token, _ in run]
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        pieces.append(Piece(_shortened(visible(text), max_chars), bool(supervised)))
    return pieces


def visible(text: str) -> str:
    """`text` with what a screen would hide or obey written out: `↵` before a line break, other control characters,
    and spaces that are no plain space, as `\\u3000`."""
    return "".join("↵\n" if one == "\n" else _escaped(one) for one in text)


def _escaped(one: str) -> str:
    hidden = unicodedata.category(one) in ("Cc", "Cf", "Co", "Zs", "Zl", "Zp") and one != " "
    return one.encode("unicode_escape").decode("ascii") if hidden else one


def _shortened(text: str, max_chars: int) -> str:
    if len(text) <= max_chars + 40:  # less would not be shorter with the note in it
        return text
    head, tail = text[: max_chars * 2 // 3], text[-(max_chars // 3) :]
    return f"{head} … {len(text) - len(head) - len(tail)} characters … {tail}"
