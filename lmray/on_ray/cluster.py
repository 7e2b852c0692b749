"""The connection to Ray: the cluster that RAY_ADDRESS names, else a local Ray that is stopped again; in the driver.

A local Ray asks for a token (on one machine other users can reach its ports too). Where the user has none, one is made
for this process only and handed to Ray's own processes by environment: nothing is written into the user's home.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private.authentication import authentication_token_setup
from ray.exceptions import AuthenticationError

import lmray
from lmray.errors import ConfigError, RemoteError
from lmray.job import Resources
from lmray.models.room import check_room, room_for

PROBE_TIMEOUT_S = 5.0
OBJECT_STORE_BYTES = 256 * 2**20
"""Of a local Ray. Data and checkpoints go through storage, so little passes through Ray's own object store."""
START_ATTEMPTS = 2
RAY_WAITS_S = 30
"""For a local Ray's own processes to start; set in Ray."""
_TOO_SLOW = "timed out during startup"
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray in the driver of a submitted job."""
WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
TOKEN_HINT = "where it asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to a file with it"
_TOKEN = secrets.token_hex(32)


@dataclass(frozen=True)
class Node:
    """What one node of the cluster offers in total, used or not."""

    address: str
    cpus: float
    gpus: float
    memory_bytes: float


@dataclass(frozen=True)
class ClusterResources:
    """The nodes that are alive."""

    nodes: tuple[Node, ...]

    @property
    def cpus(self) -> float:
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> float:
        return sum(node.gpus for node in self.nodes)

    def room_for(self, *, cpus: float, gpus: float) -> int:
        """How many workers of that size fit, each whole on one node."""
        return room_for(self.nodes, cpus=cpus, gpus=gpus)


@contextmanager
def connected(*, num_cpus: int | None = None, num_gpus: int | None = None) -> Iterator[ClusterResources]:
    """Connects this process to Ray for the length of the block and gives what the cluster offers.

    A connection that exists already is used and left alone. `num_cpus`, `num_gpus` are what a local Ray pretends to
    have; by default what the machine has. Raises RemoteError for a cluster that does not answer, ConfigError for an
    address of another kind.
    """
    if ray.is_initialized():
        yield cluster_resources()
        return
    address = os.environ.get("RAY_ADDRESS", "")
    local, others = address in ("", "local"), set(psutil.Process().children())
    with _same_sigterm():
        if local:
            _start_local(num_cpus, num_gpus)
        else:
            _join(address)
    try:
        with _unwatched() if local else nullcontext():
            yield cluster_resources()
    finally:
        if local:
            _end_helpers(others)
        ray.shutdown()


@contextmanager
def _unwatched() -> Iterator[None]:
    """Nobody gives notice of taking this machine's own Ray away: a process less that listens for it."""
    if WATCHER in os.environ:
        yield
        return
    os.environ[WATCHER] = "0"
    try:
        yield
    finally:
        os.environ.pop(WATCHER, None)


def cluster_resources() -> ClusterResources:
    """The connected cluster's nodes, in a stable order."""
    nodes = [_node(facts) for facts in ray.nodes() if facts["Alive"]]
    return ClusterResources(tuple(sorted(nodes, key=lambda node: node.address)))


def _node(facts: dict) -> Node:
    offered = facts["Resources"]
    return Node(
        facts["NodeManagerAddress"], offered.get("CPU", 0.0), offered.get("GPU", 0.0), offered.get("memory", 0.0)
    )


def check_resources(resources: Resources) -> None:
    """Raises CapacityError where the connected cluster can never place the workers, or the fewest of a range, that
    `resources` asks for."""
    check_room(
        cluster_resources().nodes,
        workers=resources.workers,
        cpus=resources.cpus_per_worker,
        gpus=resources.gpus_per_worker,
    )


@contextmanager
def _same_sigterm() -> Iterator[None]:
    """Connecting makes SIGTERM end the process; a handler that was there before stays."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if callable(before) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


def _start_local(num_cpus: int | None, num_gpus: int | None) -> None:
    """Raises RemoteError where it takes longer than Ray waits, twice."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    others = set(psutil.Process().children())
    for _ in range(START_ATTEMPTS):
        try:
            with _own_token(), _deaf_to_sigterm():
                ray.init(
                    address="local",
                    num_cpus=num_cpus,
                    num_gpus=num_gpus,
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
            return
        except Exception as error:
            if _TOO_SLOW not in str(error):  # Ray has no class of its own for that
                raise
            ray.shutdown()
            _end_ray_processes(others)
    hint = "is the machine busy? RAY_ADDRESS names a Ray that runs already"
    raise RemoteError("this machine's own Ray", f"did not start within {RAY_WAITS_S} s, twice", hint=hint)


@contextmanager
def _deaf_to_sigterm() -> Iterator[None]:
    """Children inherit the mask: a SIGTERM to the whole process group (Slurm, `timeout`) leaves the local Ray up until
    its workers have saved and this process ends it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_helpers(others: Collection[psutil.Process]) -> None:
    """Ends the local Ray's monitors, children of this process that are not among `others`. They keep nothing; deaf to
    SIGTERM, they would be waited for a second each."""
    _end_ray_processes(others, suffix=".py")


def _end_ray_processes(others: Collection[psutil.Process], *, suffix: str = "") -> None:
    """Kills children of this process that are not among `others` and run a file of Ray's that ends with `suffix`."""
    package = Path(ray.__file__).parent
    with suppress(psutil.Error, OSError):
        for child in set(psutil.Process().children()) - set(others):
            with suppress(psutil.NoSuchProcess):
                if any(word.endswith(suffix) and Path(word).is_relative_to(package) for word in child.cmdline()):
                    child.kill()


@contextmanager
def _own_token() -> Iterator[None]:
    """Ray switches authentication on for a local cluster and writes `~/.ray/auth_token` where it finds no token;
    giving it one prevents that. Ray's processes inherit the environment, so it is needed for their start only."""
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
    before = {name: os.environ[name] for name in names if name in os.environ}
    if os.environ.get("RAY_AUTH_MODE", "token") == "token" and not user_token():
        os.environ["RAY_AUTH_TOKEN"] = _TOKEN
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(before)


def user_token() -> str | None:
    """The token this user has for Ray clusters: `$RAY_AUTH_TOKEN`, the file `$RAY_AUTH_TOKEN_PATH` names, else
    `~/.ray/auth_token`. Raises ConfigError for a file that is named and cannot be read."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except OSError as error:
        if not named:
            return None
        raise ConfigError(f"RAY_AUTH_TOKEN_PATH `{named}`", f"cannot be read: {error.strerror}") from None


def _join(address: str) -> None:
    where = f"RAY_ADDRESS `{address}`"
    if "://" in address:
        hint = "`lmray submit CONFIG --address http://HOST:8265` runs a job there; unset RAY_ADDRESS to run it here"
        raise ConfigError(where, "is not a cluster's own address", allowed="HOST:6379, auto, local", hint=hint)
    if address != "auto":
        _probe(address, where)
    # A submitted job brought its package; a driver from outside brings it here, so that workers run the same code.
    brought = None if JOB_VARIABLE in os.environ else package_environment()
    for name in ("ray._private.runtime_env.packaging", authentication_token_setup.__name__):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Ray does this for `ray start`, but lets a driver that joins send no token although the user has one.
    authentication_token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, runtime_env=brought)
    except AuthenticationError:
        raise RemoteError(where, "the cluster refused this token, or asks for one", hint=TOKEN_HINT) from None
    except (ConnectionError, RuntimeError) as error:
        hint = "start it with `ray start --head`, or unset RAY_ADDRESS to run here; " + TOKEN_HINT
        raise RemoteError(where, f"no cluster to connect to: {error}", hint=hint) from None


def package_environment() -> dict[str, Any]:
    """The part of a runtime environment that sends this package: the folder it was imported from."""
    return {"py_modules": [str(Path(lmray.__file__).parent)], "excludes": ["__pycache__"]}


def _probe(address: str, where: str) -> None:
    """Ray itself waits two minutes for a head that is not there, and then ends the process."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(where, "is no address", allowed="HOST:6379, auto, local")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_TIMEOUT_S).close()
    except OSError as error:
        hint = "check host and port, or unset RAY_ADDRESS to run on this machine"
        raise RemoteError(where, f"no cluster answers: {error.strerror or error}", hint=hint) from None
