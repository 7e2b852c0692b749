"""A run's name belongs to what it began as: the same name with other content is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmray.errors import ConfigError


def check_same_plan(
    before: Mapping[str, Any], now: Mapping[str, Any], folder: Path, *, others: Sequence[str] = ()
) -> None:
    """Raises ConfigError where plan `before`, which the run in `folder` began with, is of another run than plan `now`.

    Both have `run_key`, `fields` (those that decide the result, by dotted path), `model` and `data` with a `digest`,
    and the entries `others`. The error names what differs.
    """
    if before["run_key"] == now["run_key"]:
        return
    was, fields = before["fields"], now["fields"]
    keys = sorted({*was, *fields})
    changed = [f"{key}: {was.get(key)} -> {fields.get(key)}" for key in keys if was.get(key) != fields.get(key)]
    changed += [f"{part} digest" for part in ("model", "data") if before[part]["digest"] != now[part]["digest"]]
    changed += [other for other in others if before[other] != now[other]]
    hint = f"give the job another `name`, or remove {folder} to start over"
    raise ConfigError(f"run `{now['name']}`", "is already there with other content: " + "; ".join(changed), hint=hint)
