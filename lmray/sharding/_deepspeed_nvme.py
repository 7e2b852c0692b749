"""Where DeepSpeed keeps what is offloaded to a disk: each rank's own folder, gone with the process that made it."""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import subprocess
import tempfile
import weakref
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import torch.distributed as dist

from lmray.errors import ConfigError

OWN = ".lmray-offload"
"""In the folder that the job names, and nothing else's: what is swept is only ever in there."""
PREFIX = "rank-"
FIELD = "sharding.nvme_path"
TRIED = "#include <libaio.h>\nint main() { return io_submit(0, 0, 0); }\n"
HINT = "install `libaio-dev`, `g++` and `ninja` on every worker, or offload to the `cpu`"
LONGEST_BUILD_TRY_S = 60.0


def check_absolute(path: str) -> None:
    """Raises ConfigError where `path` would be another folder on every worker."""
    if not Path(path).is_absolute():
        raise ConfigError(FIELD, f"`{path}` is relative", allowed="an absolute path on every worker")


def check_path(path: str) -> None:
    """Raises ConfigError where `path` is no folder on this machine, or none that can be made and written to."""
    folder = Path(path)
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
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    for tool in (compiler[0], "ninja"):
        if shutil.which(tool) is None:
            raise ConfigError("sharding", f"`nvme` needs `async_io` compiled, and `{tool}` is not in PATH", hint=HINT)
    with tempfile.TemporaryDirectory() as folder:
        command = [*compiler, "-x", "c++", "-", "-o", f"{folder}/tried", "-laio"]
        try:
            tried = subprocess.run(
                command, input=TRIED, capture_output=True, text=True, timeout=LONGEST_BUILD_TRY_S, check=False
            )
        except subprocess.TimeoutExpired:
            why = f"`{shlex.join(command)}` took more than {LONGEST_BUILD_TRY_S:.0f} s"
            raise ConfigError("sharding", f"`nvme` needs `async_io` compiled: {why}", hint=HINT) from None
    if tried.returncode:
        why = tried.stderr.strip().partition("\n")[0]
        raise ConfigError("sharding", f"`nvme` needs `async_io` compiled, and libaio is not here: {why}", hint=HINT)


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
    """A new folder below `path`, this process's alone until it ends, however it ends: what dead ones left is removed.
    Raises ConfigError where it cannot be made."""
    own = Path(path, OWN)
    try:
        own.mkdir(parents=True, exist_ok=True)
        with _locked(own):
            _sweep(own)
            folder = tempfile.mkdtemp(prefix=PREFIX, dir=own)
            _lock(folder)  # left open: the lock goes with the process
    except OSError as error:
        raise ConfigError(FIELD, f"{path} cannot be written to: {error.strerror or error}") from None
    return Path(folder)


def made_ready(path: str) -> Path:
    """`own_folder`, with `async_io` loaded; on all ranks together. Raises ConfigError on all of them where it cannot be
    had on one: a rank that left alone would be waited for."""
    folder: Path | None = None
    mine: ConfigError | None = None
    try:
        check_path(path)
        check_async_io()
        folder = own_folder(path)
        load_async_io()
    except ConfigError as error:
        mine = error
    errors: list[ConfigError | None] = [mine] * dist.get_world_size()
    dist.all_gather_object(errors, mine)
    for error in errors:
        if error is not None:
            raise error
    assert folder is not None
    return folder


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
def _locked(path: Path):
    opened = _lock(path)
    try:
        yield
    finally:
        os.close(opened)
