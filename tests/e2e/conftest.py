"""The commands as a user types them, on a tiny model, with a home of their own."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, chdir, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import psutil
import pytest
import ray
import yaml

from lmray.cli import main
from lmray.config import dump
from lmray.testing.jobs import tiny_job

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Shell:
    """Runs commands in a folder of its own; nothing of the user's environment that lmray or Ray read leaks in."""

    folder: Path
    env: dict[str, str] = field(default_factory=dict)
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def lmray(self, *arguments: str, **options) -> subprocess.CompletedProcess[str]:
        """`lmray ARGUMENTS`, to its end."""
        return self.python("-m", "lmray", *arguments, **options)

    def lmray_here(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """The same in this process, for what is to end before Ray starts: another process costs seconds."""
        out, err = io.StringIO(), io.StringIO()
        with ExitStack() as stack:
            stack.enter_context(patch.dict(os.environ, self.env, clear=True))
            stack.enter_context(patch.object(ray, "init", side_effect=AssertionError("Ray started")))
            for one in (chdir(self.folder), redirect_stdout(out), redirect_stderr(err)):
                stack.enter_context(one)
            left = stack.enter_context(pytest.raises(SystemExit))
            main(list(arguments))
        return subprocess.CompletedProcess(arguments, int(left.value.code or 0), out.getvalue(), err.getvalue())

    def python(self, *arguments: str, timeout_s: float = 500) -> subprocess.CompletedProcess[str]:
        """The tests' own Python with `arguments`."""
        command = [sys.executable, *arguments]
        return subprocess.run(
            command, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=timeout_s, check=False
        )

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """`lmray ARGUMENTS` in the background, in a session of its own; what is left of it ends with the test."""
        command = [sys.executable, "-m", "lmray", *arguments]
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=_hear_interrupts,
        )
        self.started.append(process)
        return process

    def alive(self, process: subprocess.Popen[str]) -> list[psutil.Process]:
        """What `process`, a started one, and all it started still have running."""
        return [one for one in psutil.process_iter() if _session(one.pid) == process.pid and _runs(one)]


def words(process: psutil.Process) -> str:
    """Of its command line; none where it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _hear_interrupts() -> None:
    """A shell starts background commands deaf to SIGINT, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def shell(tmp_path) -> Iterator[Shell]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "LMRAY_", "HF_"))}
    own = {
        "HOME": str(tmp_path / "home"),
        "LMRAY_STORE": str(tmp_path / "store"),
        "LMRAY_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "RAY_prestart_worker_first_driver": "0",
        "PYTHONIOENCODING": "utf-8",
    }
    (tmp_path / "home").mkdir()
    folder = tmp_path / "work"
    folder.mkdir()
    shell = Shell(folder, kept | own)
    yield shell
    for process in shell.started:
        for left in shell.alive(process):
            with suppress(psutil.NoSuchProcess):
                left.kill()


@pytest.fixture
def train_file(shell, tiny_model, tiny_data) -> Path:
    """A training job that keeps the artifact `colours`."""
    job = tiny_job(
        tiny_model, tiny_data, shell.folder, output={"artifact": "colours"}, resources={"cpus_per_worker": 1}
    )
    tree = dump(job)
    tree.pop("storage")
    path = shell.folder / "train.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True, sort_keys=False), encoding="utf-8")
    return path


def one_json(text: str) -> dict:
    """`text` must be exactly one JSON object."""
    return json.loads(text)


def last_step(run: Path) -> int:
    """Of the last whole line in the log of the run in folder `run`; 0 where there is none."""
    path = run / "events.jsonl"
    lines = path.read_bytes().rpartition(b"\n")[0].splitlines() if path.is_file() else []
    return json.loads(lines[-1])["step"] if lines else 0
