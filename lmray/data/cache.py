"""Tokenised data on disk, so that a second start of the same job reads it instead of making it.

An entry of the cache, `tokenised/KEY`, holds parts in safetensors. KEY covers everything the tokens depend on, so
nothing is ever updated. Parts are written as they are made and mapped into memory, so that only the rows in use take
room there.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import tokenizers
import transformers

from lmray.artifacts.files import folder_digests, sha256_json
from lmray.data.base import Example
from lmray.data.entries import entry, map_arrays, save_arrays
from lmray.data.rules import Rules
from lmray.data.stored import examples_digest, once, places
from lmray.data.table import Part, Table
from lmray.data.tokenise import TokenisedData, tokenised_parts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 2
"""A new number where the same input becomes other tokens, or they are kept in another way."""
PART_TOKENS = 4_000_000
"""A part is closed when it has so many tokens; about 32 MB."""


def tokenise_cached(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], rules: Rules) -> TokenisedData:
    """What `tokenise_all` gives for `examples`, from the cache where it was made before; of examples that repeat, the
    tokens are there once. Raises what `tokenise_all` raises, and CapacityError where the cache cannot be written."""
    if not examples:
        return TokenisedData(Table([]))
    different, order = once(examples)
    digests = [tokenizer_digest(tokenizer), examples_digest(different)]
    key = sha256_json([VERSION, transformers.__version__, tokenizers.__version__, *digests, vars(rules)])

    def make(folder: Path) -> dict[str, int]:
        return {"parts": _write_parts(folder, tokenised_parts(tokenizer, different, rules))}

    parts = entry("tokenised", key, make=make, read=lambda folder, facts: _parts(folder, facts["parts"]))
    return TokenisedData.of(parts, places(different), max_length=rules.max_length, order=order)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of all that decides how `tokenizer` renders and encodes, whichever files it came from."""
    facts = [type(tokenizer).__name__, tokenizer.chat_template, dict(tokenizer.special_tokens_map)]
    if tokenizer.is_fast:
        rules = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()  # type: ignore[attr-defined]
    else:
        with tempfile.TemporaryDirectory() as scratch:
            tokenizer.save_pretrained(scratch)
            rules = sha256_json(folder_digests(Path(scratch)))
    return sha256_json([*facts, rules])


def _write_parts(folder: Path, parts: Iterator[Part]) -> int:
    """Writes `parts`, small ones together; how many files there are."""
    count, waiting = 0, list[Part]()
    for part in parts:
        waiting.append(part)
        if sum(len(one.ids_N) for one in waiting) >= PART_TOKENS:
            save_arrays(vars(Part.joined(waiting)), _file(folder, count))
            count, waiting = count + 1, []
    if waiting:
        save_arrays(vars(Part.joined(waiting)), _file(folder, count))
    return count + bool(waiting)


def _parts(folder: Path, count: int) -> list[Part]:
    return [Part(**map_arrays(_file(folder, number))) for number in range(count)]


def _file(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05d}.safetensors"
