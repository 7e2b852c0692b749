"""Berkeley Function Calling questions and their accepted answers, out of the wheel `bfcl-eval` (Apache-2.0).

Prompt: the functions and the user's request; answer: the call as JSON. Single calls only. A row's accepted values
keep the leaderboard's form: for each parameter a list of what counts as right, an empty string among them where it
may be left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from lmray.data.base import Example, Mapping, Row
from lmray.errors import DataError

SYSTEM = 'Answer with one function call as JSON: {"name": ..., "arguments": {...}}. Functions:\n'


class Bfcl(Mapping):
    """Single-call categories of the Berkeley Function Calling data."""

    categories: tuple[Literal["simple_python", "multiple", "live_simple", "live_multiple"], ...] = (
        "simple_python",
        "multiple",
        "live_simple",
    )

    def members(self) -> tuple[str, ...]:
        return tuple(f"bfcl_eval/data/BFCL_v4_{category}.json" for category in self.categories)

    def rows(self, files: tuple[Path, ...], read: Callable[[Path], Iterator[Row]]) -> Iterator[Row]:
        for file in files:
            answered = read(_answers(file))
            answers = {str(row.value.get("id")): row.value.get("ground_truth") for row in answered}
            for row in read(file):
                yield Row(row.where, {**row.value, "ground_truth": answers.get(str(row.value.get("id")))})

    def reads(self, files: tuple[Path, ...]) -> tuple[Path, ...]:
        return (*files, *map(_answers, files))

    def example(self, row: Row) -> Example:
        try:
            ((call,), turns, functions) = row.value["ground_truth"], row.value["question"][0], row.value["function"]
            ((name, accepted),) = call.items()
            request = "\n".join(turn["content"] for turn in turns)
            answer = {"name": name, "arguments": _first(accepted)}
            signatures = "\n".join(map(_compact, functions))
            identity = row.value["id"]
        except (KeyError, ValueError, TypeError, IndexError, AttributeError):
            hint = "the mapping `bfcl` reads files of the wheel bfcl-eval"
            raise DataError(row.where, "is no single-call question with its answer", hint=hint) from None
        messages = (
            {"role": "system", "content": SYSTEM + signatures},
            {"role": "user", "content": request},
            {"role": "assistant", "content": json.dumps(answer, ensure_ascii=False)},
        )
        columns = {**row.value, "function": name, "question": request, "id": identity}
        return Example(messages, row.where, columns, {"name": name, "arguments": accepted})


def _answers(file: Path) -> Path:
    return file.parent / "possible_answer" / file.name


def _first(accepted: dict[str, list[Any]]) -> dict[str, Any]:
    """The call that the first accepted value of each parameter makes; one that may be left out first is left out."""
    return {key: _value(values[0]) for key, values in accepted.items() if values and values[0] != ""}


def _value(value: Any) -> Any:
    if isinstance(value, dict):
        return _first(value)
    return [_value(item) for item in value] if isinstance(value, list) else value


def _compact(function: dict[str, Any]) -> str:
    """A function's signature in one line, without the words JSON schema needs and a small model does not."""
    parameters = function["parameters"]
    required = parameters.get("required", [])
    listed = {
        name + ("" if name in required else "?"): _type(facts) + ": " + facts.get("description", "")
        for name, facts in parameters.get("properties", {}).items()
    }
    signature = {"name": function["name"], "description": function.get("description", ""), "parameters": listed}
    return json.dumps(signature, ensure_ascii=False)


def _type(facts: dict[str, Any]) -> str:
    if "enum" in facts:
        return "one of " + json.dumps(facts["enum"], ensure_ascii=False)
    if facts.get("type") == "array":
        return f"array of {facts.get('items', {}).get('type', 'any')}"
    return str(facts.get("type", "any"))
