"""Tokenised data on disk, so that a second start of the same job reads it instead of making it.

An entry is a folder under the cache, `tokenised/KEY`: parts in safetensors, and last a manifest with their digests. KEY
covers everything the tokens depend on, so nothing is ever updated; an entry that is not what its manifest says is made
again. Parts are mapped into memory, so that only the rows in use take room there. All processes of a node share it: the
first makes the entry, the others wait.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import tokenizers
import torch
import transformers
from filelock import FileLock
from safetensors import SafetensorError, safe_open

from lmray.artifacts.files import folder_digests, fsync, read_sealed, seal, sha256_json, temporary_beside
from lmray.config.places import cache_root
from lmray.data.base import Example
from lmray.data.rules import Rules
from lmray.data.table import Part, Table
from lmray.data.tokenise import Tally, TokenisedData, tokenised_parts
from lmray.errors import ArtifactError, CapacityError
from lmray.models.tensors import save_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 1
"""A new number where the same input becomes other tokens."""
PART_TOKENS = 4_000_000
"""A part is closed when it has so many tokens; about 32 MB."""


def tokenise_cached(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], rules: Rules) -> TokenisedData:
    """What `tokenise_all` gives for `examples`, from the cache where it was made before. Raises what `tokenise_all`
    raises, and CapacityError where the cache cannot be written."""
    if not examples:
        return TokenisedData(Table([]))
    digests = [tokenizer_digest(tokenizer), examples_digest(examples)]
    key = sha256_json([VERSION, transformers.__version__, tokenizers.__version__, *digests, vars(rules)])
    folder = cache_root() / "tokenised" / key
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{key}.lock")):
            found = _read(folder, examples)
            if found is None:
                _write(folder, tokenizer, examples, rules)
                found = _read(folder, examples)
    except (OSError, SafetensorError) as error:
        hint = "free some space, or set LMRAY_CACHE to a folder that can be written"
        raise CapacityError(str(folder), f"tokenised data cannot be kept: {error}", hint=hint) from None
    assert found is not None, "what was just written is there"
    return found


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


def examples_digest(examples: Sequence[Example]) -> str:
    """Of what is tokenised of `examples`, in order."""
    digest = hashlib.sha256()
    for example in examples:
        content = [example.messages, example.tools, example.text, example.assistant_only_loss]
        digest.update(json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
    return digest.hexdigest()


def _write(folder: Path, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], rules: Rules) -> None:
    for left in folder.parent.glob(f".{folder.name}.*.tmp"):  # by a process that was killed; the lock is ours now
        shutil.rmtree(left, ignore_errors=True)
    temporary = temporary_beside(folder)
    temporary.mkdir()
    tally = Tally()
    try:
        count, waiting = 0, []
        for part in tokenised_parts(tokenizer, examples, rules, tally):
            waiting.append(part)
            if sum(len(one.ids_N) for one in waiting) >= PART_TOKENS:
                _write_part(temporary, count, waiting)
                count, waiting = count + 1, []
        if waiting:
            _write_part(temporary, count, waiting)
        seal(temporary, **vars(tally))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
        fsync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_part(folder: Path, number: int, parts: Sequence[Part]) -> None:
    joined = Part.joined(parts)
    tensors = {name: torch.from_numpy(array) for name, array in vars(joined).items()}
    save_tensors(tensors, folder / f"part-{number:05d}.safetensors")


def _read(folder: Path, examples: Sequence[Example]) -> TokenisedData | None:
    """The entry in `folder`, or None where there is none that is whole."""
    try:
        facts = read_sealed(folder)
        parts = [_mapped(folder / name) for name in sorted(facts["files"])]
        tally = Tally(**{name: facts[name] for name in vars(Tally())})
        return TokenisedData.of(parts, examples, tally)
    except (ArtifactError, SafetensorError, AttributeError, KeyError, TypeError):
        return None


def _mapped(path: Path) -> Part:
    with safe_open(path, framework="pt") as file:  # its tensors are maps of the file
        return Part(**{name: file.get_tensor(name).numpy() for name in file.keys()})  # noqa: SIM118
