"""The tokenizer of a model folder as keys of a GGUF file: byte-level BPE, as most open models have it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from lmray.errors import ArtifactError
from lmray.models.load import load_tokenizer

NAMES = {regex: name for name, regex in reversed(GGUF_PRE_TOKENIZER_SPLITS.items())}
"""By the pattern that text is split with before merging, the name that readers of GGUF know it by."""


def add_vocabulary(writer: GGUFWriter, folder: Path, *, rows: int) -> None:
    """Writes the tokenizer in `folder` for an embedding of `rows` rows, with its special tokens and chat template.
    Raises ArtifactError for a tokenizer of another kind, or one whose splitting of text has no name in GGUF."""
    tokenizer: Any = load_tokenizer(folder, chat=False)
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model = described["model"]
    if (
        model["type"] != "BPE"
        or model.get("byte_fallback")
        or (described.get("decoder") or {}).get("type") != "ByteLevel"
    ):
        found = f"is {model['type']} over characters, which cannot be written as GGUF"
        raise ArtifactError(f"tokenizer in {folder}", found, allowed="byte-level BPE", hint="`--format hf` exports it")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_splitting(described, folder))
    tokens, types = _tokens(tokenizer, rows)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = SpecialVocab(folder, load_merges=bool(model["merges"]), n_vocab=rows)
    for kind, ids in _added(tokenizer).items():
        special.add_special_token[kind] = ids
    special.add_to_gguf(writer, quiet=True)
    writer.add_add_space_prefix(False)


def _tokens(tokenizer: Any, rows: int) -> tuple[list[str], list[TokenType]]:
    """A token a row; rows that the tokenizer has no token for are said to be unused."""
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for index in range(rows):
        tokens.append(by_id.get(index, f"[PAD{index}]"))
        if index in added:
            types.append(TokenType.CONTROL if added[index].special else TokenType.USER_DEFINED)
        else:
            types.append(TokenType.NORMAL if index in by_id else TokenType.UNUSED)
    return tokens, types


def _added(tokenizer: Any) -> dict[str, bool]:
    """Whether text is read with its begin and end token, as the tokenizer really does it."""
    with_special, plain = (tokenizer("a", add_special_tokens=on)["input_ids"] for on in (True, False))
    more = len(with_special) > len(plain)
    return {
        "bos": more and with_special[0] == tokenizer.bos_token_id,
        "eos": more and with_special[-1] == tokenizer.eos_token_id,
    }


def _splitting(described: dict[str, Any], folder: Path) -> str:
    """GGUF's name of the way in which text is split before pieces are merged."""
    if not described["model"]["merges"]:
        return "gpt-2"  # where nothing is merged, nothing hangs on it
    if described.get("normalizer") not in (None, {"type": "NFC"}):
        raise _unnamed(folder, f"normalises text by {described['normalizer']['type']}")
    split: dict[str, Any] = described["pre_tokenizer"] or {"type": "nothing"}
    steps = split["pretokenizers"] if split["type"] == "Sequence" else [split]
    kinds = [step["type"] for step in steps]
    regexes = [step.get("pattern", {}).get("Regex") for step in steps if step["type"] == "Split"]
    if any(step.get("add_prefix_space") for step in steps):
        raise _unnamed(folder, "puts a space before text in a way")
    if kinds == ["ByteLevel"] and steps[0]["use_regex"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1]["use_regex"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and regexes[0] in NAMES and not steps[1]["use_regex"]:
        return NAMES[regexes[0]]
    raise _unnamed(folder, f"splits text by {' and '.join(kinds)} in a way")


def _unnamed(folder: Path, found: str) -> ArtifactError:
    allowed = "the ways of " + ", ".join(sorted({"gpt-2", "smollm", *NAMES.values()}))
    return ArtifactError(f"tokenizer in {folder}", f"{found} that GGUF has no name for", allowed=allowed)
