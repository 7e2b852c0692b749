"""Where DeepSpeed keeps what is offloaded to a disk: each rank's own folder, gone with the process that made it."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
import weakref
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

from lmray.errors import ConfigError

PREFIX = "lmray-"
FIELD = "sharding.nvme_path"
TRIED = "#include <libaio.h>\nint main() { return io_submit(0, 0, 0); }\n"
HINT = "install `libaio-dev`, `g++` and `ninja` on every worker, or offload to the `cpu`"
LONGEST_BUILD_TRY_S = 60.0


def check_path(path: str) -> None:
    """Raises ConfigError where `path` is no folder on this machine, or none that can be made and written to."""
    folder = Path(path)
    if not folder.is_absolute():
        raise ConfigError(FIELD, f"`{path}` is relative", allowed="an absolute path on every worker")
    there = next(one for one in (folder, *folder.parents) if one.exists())
    if not there.is_dir():
        raise ConfigError(FIELD, f"{there} is no folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(FIELD, f"{there} cannot be written to", hint="name a folder on a disk of the worker's own")


def check_async_io() -> None:
    """Raises ConfigError where DeepSpeed's `async_io` is neither installed nor can be compiled here."""
    found = find_spec("deepspeed")
    places = (found and found.submodule_search_locations) or []
    if any(list(Path(place, "ops", "aio").glob("async_io_op*.so")) for place in places):
        return
    compiler = os.environ.get("CXX", "c++")
    for tool in (compiler, "ninja"):
        if shutil.which(tool) is None:
            raise ConfigError("sharding", f"`nvme` needs `async_io` compiled, and `{tool}` is not in PATH", hint=HINT)
    with tempfile.TemporaryDirectory(prefix=PREFIX) as folder:
        command = [compiler, "-x", "c++", "-", "-o", f"{folder}/tried", "-laio"]
        tried = subprocess.run(
            command, input=TRIED, capture_output=True, text=True, timeout=LONGEST_BUILD_TRY_S, check=False
        )
    if tried.returncode:
        found = (
            f"`nvme` needs `async_io` compiled, and libaio is not here: {tried.stderr.strip().partition(chr(10))[0]}"
        )
        raise ConfigError("sharding", found, hint=HINT)


def load_async_io() -> None:
    """Loads the operation, compiled at its first use on a machine: a minute, once. The processes of a machine wait for
    the one that compiles. Raises ConfigError where it cannot be."""
    from deepspeed.ops.op_builder import AsyncIOBuilder  # type: ignore[attr-defined]  # noqa: PLC0415

    try:
        AsyncIOBuilder().load(verbose=False)
    except (RuntimeError, OSError, ImportError) as error:
        why = str(error).strip().partition("\n")[0]
        raise ConfigError("sharding", f"`nvme` needs `async_io` compiled, which failed: {why}", hint=HINT) from error


def own_folder(path: str) -> Path:
    """A new folder in `path`, this process's alone until it ends, however it ends: what dead ones left is removed.
    Raises ConfigError where it cannot be made."""
    try:
        os.makedirs(path, exist_ok=True)
        with _locked(path):
            _sweep(Path(path))
            folder = tempfile.mkdtemp(prefix=PREFIX, dir=path)
            _lock(folder)  # left open: the lock goes with the process
    except OSError as error:
        raise ConfigError(FIELD, f"{path} cannot be written to: {error.strerror or error}") from None
    return Path(folder)


def remove_with(owner: object, folder: Path) -> None:
    """Removes `folder` when `owner` goes or the process ends."""
    weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)


def _sweep(path: Path) -> None:
    for left in path.glob(f"{PREFIX}*"):
        with suppress(BlockingIOError, FileNotFoundError, NotADirectoryError):
            os.close(_lock(left, wait=False))
            shutil.rmtree(left, ignore_errors=True)


def _lock(folder: str | Path, *, wait: bool = True) -> int:
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(opened)
        raise
    return opened


@contextmanager
def _locked(path: str):
    opened = _lock(path)
    try:
        yield
    finally:
        os.close(opened)
