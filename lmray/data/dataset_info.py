"""Data folders of LLaMA-Factory, read as they are: `PATH/dataset_info.json:NAME`.

An entry names a file and says how its columns and turns are called. Its rows get the columns that lmray's mappings
read, beside their own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmray.data.base import Mapping, Row
from lmray.data.mappings.alpaca import Alpaca
from lmray.data.mappings.preference import Preference
from lmray.data.mappings.sharegpt import Sharegpt
from lmray.data.mappings.text import Text
from lmray.data.turns import kind, read_column, read_turns
from lmray.errors import DataError, did_you_mean

_SOURCE = re.compile(r"(?P<path>.*dataset_info\.json)(:(?P<name>.+))?")
_ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "chosen": "chosen", "rejected": "rejected"}
_SHAREGPT = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
_COLUMNS = (*_ALPACA, "messages", "history", "system", "tools", "kto_tag")
_MEDIA = ("images", "videos", "audios")
_TAGS = ("role_tag", "content_tag", "user_tag", "assistant_tag", "observation_tag", "function_tag", "system_tag")


@dataclass(frozen=True)
class Entry:
    """One data set of a `dataset_info.json`."""

    source: str
    """Where its rows are, as a job would write it."""
    mapping: Mapping
    adapt: Callable[[Row], Row]
    """A row of the file -> one that `mapping` reads."""
    definition: dict[str, Any]
    """As it is written."""


def is_entry(source: str) -> bool:
    return entry_file(source) is not None


def entry_file(source: str) -> str | None:
    """The `dataset_info.json` that `source` names an entry of; None for a source of another kind."""
    match = _SOURCE.fullmatch(source)
    return match["path"] if match else None


def read_entry(source: str, asked: Mapping | None) -> Entry:
    """The entry that `source` names. `asked`, the job's own mapping, may only be `preference`, for its `use`.

    Raises DataError for a file that is none, a name it does not hold, and what lmray does not read.
    """
    match = _SOURCE.fullmatch(source)
    assert match is not None
    path, name = Path(match["path"]).expanduser(), match["name"]
    entry, where = _entry(path, name), f"{path}: {name}"
    shape = _shape(entry, where)
    if asked is not None and not (isinstance(asked, Preference) and isinstance(shape.mapping, Preference)):
        hint = "leave `mapping` out; it may be `{name: preference, use: chosen}` for an entry with preferences"
        raise DataError(where, f"says itself how it is read; the job says `{asked.name}`", hint=hint)
    mapping = asked if asked is not None else shape.mapping
    return Entry(_location(entry, path.parent, where), mapping, shape.adapt, entry)


@dataclass(frozen=True)
class _Shape:
    mapping: Mapping
    adapt: Callable[[Row], Row] = lambda row: row


def _entry(path: Path, name: str | None) -> dict[str, Any]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(str(path), "no such file", hint="write PATH/dataset_info.json:NAME") from None
    except (OSError, ValueError) as error:
        raise DataError(str(path), f"is no readable dataset_info.json: {error}") from None
    if not isinstance(entries, dict):
        raise DataError(str(path), f"holds {kind(entries)}", allowed="an object with an entry for each data set")
    if name is None or not isinstance(entries.get(name), dict):
        found = f"defines no data set `{name}`" if name else "holds several data sets, and none is named"
        hint = did_you_mean(name or "", entries) or "write dataset_info.json:NAME"
        raise DataError(str(path), found, allowed=", ".join(entries), hint=hint)
    return entries[name]


def _location(entry: dict[str, Any], folder: Path, where: str) -> str:
    if entry.get("num_samples"):
        hint = "leave `num_samples` out, and give the source a `weight`"
        raise DataError(where, "asks for a random sample (`num_samples`), which lmray does not take", hint=hint)
    if entry.get("file_name"):
        return str(folder / (entry.get("folder") or "") / entry["file_name"])
    if entry.get("hf_hub_url"):
        parts = (entry["hf_hub_url"], entry.get("subset"), entry.get("split") or "train")
        return "hf:" + ":".join(part for part in parts if part)
    if entry.get("cloud_file_name"):
        return entry["cloud_file_name"]
    allowed = "file_name, hf_hub_url or cloud_file_name"
    raise DataError(where, f"says no place that lmray reads: {', '.join(entry)}", allowed=allowed)


def _shape(entry: dict[str, Any], where: str) -> _Shape:
    formatting = entry.get("formatting", "alpaca")
    if formatting not in ("alpaca", "sharegpt"):
        hint = did_you_mean(str(formatting), ("alpaca", "sharegpt"))
        raise DataError(f"{where}: formatting", f"is {formatting!r}", allowed="alpaca, sharegpt", hint=hint)
    columns = _columns(entry, _ALPACA if formatting == "alpaca" else _SHAREGPT, where)
    if formatting == "alpaca" and columns.keys() == {"prompt"}:
        return _Shape(Text(column=columns["prompt"]))
    mapping = _alpaca(columns, where) if formatting == "alpaca" else _sharegpt(columns, entry.get("tags") or {}, where)
    if entry.get("ranking"):
        return _Shape(Preference(), lambda row: _ranked(row, mapping, columns))
    if "kto_tag" in columns:
        return _Shape(Preference(), lambda row: _labelled(row, mapping, columns))
    return _Shape(mapping)


def _columns(entry: dict[str, Any], default: dict[str, str], where: str) -> dict[str, str]:
    """What each role's column is called. An entry that names columns has those only."""
    named = entry.get("columns")
    if named is None:
        return default
    if not isinstance(named, dict):
        raise DataError(f"{where}: columns", f"holds {kind(named)}", allowed="an object: role of a column -> its name")
    for key in named:
        if key not in _COLUMNS:
            raise DataError(
                f"{where}: columns",
                f"`{key}` is not read",
                allowed=", ".join(_COLUMNS),
                hint="lmray reads text" if key in _MEDIA else did_you_mean(key, _COLUMNS),
            )
    return {key: column for key, column in named.items() if column}


def _alpaca(columns: dict[str, str], where: str) -> Alpaca:
    if "prompt" not in columns:
        raise DataError(f"{where}: columns", "name no `prompt`", allowed=", ".join(_COLUMNS))
    return Alpaca(
        instruction=columns["prompt"],
        input=columns.get("query"),
        output=columns.get("response", "output"),
        system=columns.get("system"),
        history=columns.get("history"),
        tools=columns.get("tools"),
    )


def _sharegpt(columns: dict[str, str], tags: dict[str, str], where: str) -> Sharegpt:
    for key in tags:
        if key not in _TAGS:
            raise DataError(
                f"{where}: tags", f"`{key}` is not read", allowed=", ".join(_TAGS), hint=did_you_mean(key, _TAGS)
            )
    return Sharegpt(
        conversations=columns.get("messages", "conversations"),
        system=columns.get("system"),
        tools=columns.get("tools"),
        **{key: tag for key, tag in tags.items() if tag},
    )


def _ranked(row: Row, mapping: Alpaca | Sharegpt, columns: dict[str, str]) -> Row:
    """`row` with `prompt`, `chosen` and `rejected` as the mapping `preference` reads them."""
    prompt = mapping.prompt_turns(row) if isinstance(mapping, Alpaca) else mapping.turns(row)
    answers = {}
    for key in ("chosen", "rejected"):
        column = columns.get(key, key)
        value = read_column(row, column)
        if isinstance(mapping, Sharegpt):
            value = read_turns([value], f"{row.where}: column `{column}`", mapping.dialect)
        answers[key] = value if isinstance(value, str) else list(value)
    return _with(row, columns, prompt=list(prompt), **answers)


def _labelled(row: Row, mapping: Alpaca | Sharegpt, columns: dict[str, str]) -> Row:
    """`row` with `prompt`, `completion` and `label` as the mapping `preference` reads them."""
    messages = mapping.example(row).messages
    label = read_column(row, columns["kto_tag"])
    return _with(row, columns, prompt=list(messages[:-1]), completion=[messages[-1]], label=label)


def _with(row: Row, columns: dict[str, str], **values: Any) -> Row:
    tools = row.value.get(columns["tools"]) if "tools" in columns else None
    return Row(row.where, {**row.value, **values, "tools": tools})
