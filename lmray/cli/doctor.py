"""`lmray doctor`: is everything here that a run needs?"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import typer

from lmray.cli.output import AsJson, clean_stdout, emit
from lmray.errors import LmrayError

Check = tuple[str, bool, str]
"""What was looked at, whether it is as it should be, what was found."""
PACKAGES = ("torch", "ray", "transformers", "peft", "optuna")


def doctor(as_json: AsJson = False) -> None:
    """Look whether this machine has what a run needs. Exit code 1 where something is wrong."""
    with clean_stdout(as_json):
        checks = list(examine())
    rows = [{"name": name, "ok": ok, "found": found} for name, ok, found in checks]
    width = max(len(name) for name, _, _ in checks)
    text = "\n".join(f"{'ok ' if ok else 'BAD'}  {name:<{width}}  {found}" for name, ok, found in checks)
    emit({"ok": all(ok for _, ok, _ in checks), "checks": rows}, text, as_json=as_json)
    raise typer.Exit(0 if all(ok for _, ok, _ in checks) else 1)


def examine() -> Iterator[Check]:
    """Every check, in the order it is shown."""
    from lmray.config.places import cache_root, store_root

    yield "python", sys.version_info >= (3, 11), platform.python_version()
    for package in PACKAGES:
        yield package, *_version(package)
    yield "cores", True, f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} usable"
    yield "memory", *_memory()
    for name, probe in (("gpus", _gpus), ("precision", _precision), ("cluster", _cluster)):
        yield name, *_tried(probe)
    yield "store", *_writable(store_root())
    yield "cache", *_writable(cache_root())


def _tried(probe: Callable[[], str]) -> tuple[bool, str]:
    try:
        return True, probe()
    except LmrayError as error:
        return False, str(error).replace("\n", ";")
    except Exception as error:  # a broken installation raises anything; saying so is what this command is for
        return False, f"{type(error).__name__}: {error}"


def _version(package: str) -> tuple[bool, str]:
    try:
        return True, version(package)
    except PackageNotFoundError:
        return False, "not installed"


def _memory() -> tuple[bool, str]:
    import psutil

    from lmray.units import human_bytes

    memory = psutil.virtual_memory()
    return True, f"{human_bytes(memory.available)} free of {human_bytes(memory.total)}"


def _gpus() -> str:
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join(names) or "none: models run on the CPU"


def _precision() -> str:
    import torch

    from lmray.models.precision import resolve_dtype

    dtype, reason = resolve_dtype("auto", "cuda" if torch.cuda.is_available() else "cpu")
    return f"`auto` is {dtype}: {reason}"


def _cluster() -> str:
    address = os.environ.get("RAY_ADDRESS")
    if address in (None, "", "local"):
        return "RAY_ADDRESS is not set: a run starts a Ray of its own here"
    from lmray.on_ray.cluster import connected

    with connected() as offered:
        return f"{address}: {len(offered.nodes)} node(s), {offered.cpus:g} CPUs, {offered.gpus:g} GPUs"


def _writable(folder: Path) -> tuple[bool, str]:
    """Whether files can be written to `folder`, or to the closest parent that exists."""
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    ok = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    return ok, f"{folder}{'' if ok else f': cannot be written ({there})'}"
