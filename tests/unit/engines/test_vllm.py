"""vLLM as a process of the engine's own: how it is started, waited for, watched and ended.

What it answers is in `test_openai.py`, for it is asked in the same way; here a command stands in for it.
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from transformers import GPT2Config, GPT2LMHeadModel

from lmray.engines import _process
from lmray.engines._process import ServerProcess
from lmray.engines.base import Request, Sampling
from lmray.engines.vllm import Vllm
from lmray.errors import ArtifactError, CapacityError, ConfigError, RemoteError
from lmray.testing.tiny import tiny_adapter_folder
from tests.unit.engines import vllm_command
from tests.unit.engines.conftest import STOP

ROOT = Path(__file__).parents[3]


@pytest.fixture
def notes(tmp_path, monkeypatch) -> Path:
    """Where the command writes what it was given."""
    monkeypatch.setenv("FAKE_VLLM_NOTES", str(tmp_path / "notes.json"))
    return tmp_path / "notes.json"


@pytest.fixture
def command(tmp_path) -> Path:
    path = tmp_path / "bin" / "vllm"
    path.parent.mkdir()
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{vllm_command.__file__}" "$@"\n')
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def server(vllm) -> str:
    return vllm[1]


def start(empty, **changes):
    config = Vllm(**{"max_batch_size": 3, "max_adapters": 2, "max_length": 64, **changes})
    return config.start(empty, stop_token_ids=STOP, threads=2)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def test_it_is_started_with_the_jobs_sizes_and_a_key_that_no_command_line_shows(
    server, command, notes, empty, model_folder, monkeypatch
):
    monkeypatch.setenv("FAKE_VLLM_UPSTREAM", server)
    monkeypatch.setenv("PYTHONPATH", "/of/this/environment")

    async def main():
        engine = start(empty, python=str(command), arguments=("--enforce-eager",), max_lora_rank=8, max_loras=9)
        try:
            answer = [event async for event in engine.submit(Request("r", (5, 6), Sampling(3)))]
            return answer, engine.stats()
        finally:
            await engine.close()

    answer, stats = asyncio.run(main())
    told = json.loads(notes.read_text())
    port = told["arguments"][told["arguments"].index("--port") + 1]
    assert told["arguments"] == [
        "-m", "vllm.entrypoints.openai.api_server", "--model", str(model_folder), "--served-model-name", "lmray-base",
        "--host", "127.0.0.1", "--port", port, "--max-num-seqs", "3", "--max-model-len", "64", "--dtype", "float32",
        "--generation-config", "vllm", "--disable-uvicorn-access-log", "--enable-lora", "--max-loras", "2",
        "--max-cpu-loras", "2", "--max-lora-rank", "8", "--enforce-eager",
    ]  # fmt: skip
    environment = told["environment"]
    assert "PYTHONPATH" not in environment and environment["OMP_NUM_THREADS"] == "2"
    assert environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
    assert len(environment["VLLM_API_KEY"]) > 40
    assert environment["VLLM_API_KEY"] not in " ".join(told["arguments"])
    assert len(answer) == 3 and stats["failure"] is None
    assert not is_alive(told["pid"])


def test_without_adapters_it_is_started_without_them_from_its_command(
    server, command, notes, empty, model_folder, monkeypatch
):
    monkeypatch.setenv("FAKE_VLLM_UPSTREAM", server)
    monkeypatch.setenv("PATH", f"{command.parent}{os.pathsep}{os.environ['PATH']}")
    asyncio.run(start(empty, max_adapters=0).close())
    arguments = json.loads(notes.read_text())["arguments"]
    assert arguments[:2] == ["serve", str(model_folder)]
    assert not any("lora" in one and one != "lmray-base" for one in arguments)


def test_a_command_that_ends_is_told_with_its_last_words(command, notes, empty, monkeypatch):
    monkeypatch.setenv("FAKE_VLLM_FAILS", "ValueError: no such option")
    with pytest.raises(RemoteError) as caught:
        start(empty, python=str(command))
    assert "did not start: it ended with exit code 1" in str(caught.value)
    assert "ValueError: no such option" in str(caught.value)


def test_a_command_that_never_listens_is_ended(command, notes, empty, monkeypatch):
    monkeypatch.setenv("FAKE_VLLM_UPSTREAM", "http://127.0.0.1:1")
    with pytest.raises(RemoteError, match="is not up after 3 s"):
        start(empty, python=str(command), start_timeout_s=3.0)
    assert not is_alive(json.loads(notes.read_text())["pid"])


def test_a_process_that_dies_is_the_engines_failure(server, command, notes, empty, monkeypatch):
    monkeypatch.setenv("FAKE_VLLM_UPSTREAM", server)

    async def main():
        engine = start(empty, python=str(command))
        try:
            os.kill(json.loads(notes.read_text())["pid"], signal.SIGKILL)
            engine._process._process.wait(120)
            with pytest.raises(RemoteError, match="does not answer"):
                async for _ in engine.submit(Request("r", (5, 6), Sampling(3))):
                    pass
            return engine.stats()["failure"]
        finally:
            await engine.close()

    assert "it ended with exit code 137" in asyncio.run(main())


def test_no_vllm_is_told_with_what_to_do(empty):
    with pytest.raises(CapacityError, match=r"`/nowhere/python` is not on this node\n  hint: install vLLM"):
        start(empty, python="/nowhere/python")


@pytest.mark.parametrize("argument", ["--port", "--api-key=mine", "--max_model_len=9"])
def test_arguments_that_the_engine_gives_itself_are_refused(argument):
    with pytest.raises(ValidationError, match="which the engine gives itself"):
        Vllm(arguments=(argument,))


@pytest.mark.parametrize(
    "asked", [("--tensor-parallel-size", "3"), ("--tensor_parallel_size=3",), ("-tp=3",), ("-tp", "2", "-tp", "3")]
)
def test_devices_that_cannot_share_the_heads_are_refused(empty, asked):
    heads = empty.config.num_attention_heads, empty.config.num_key_value_heads
    assert heads == (4, 2)
    Vllm(arguments=("--tensor-parallel-size=4",), max_length=512).check(empty, {})
    with pytest.raises(ConfigError, match=r"3 devices cannot share 4 query and 2 key-value heads\n  allowed: 1, 2, 4"):
        Vllm(arguments=asked, max_length=512).check(empty, {})


def test_a_model_that_does_not_tell_its_heads_is_left_to_vllm():
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=10))
    Vllm(max_length=512).check(model, {})
    with pytest.raises(ConfigError, match="3 devices cannot share 2 query"):
        Vllm(max_length=512, arguments=("-tp=3",)).check(model, {})


def test_adapters_of_a_higher_rank_are_refused_before_the_start(empty, model_folder, tmp_path):
    folder = tiny_adapter_folder(model_folder, tmp_path / "adapter", seed=1, r=16)
    Vllm(max_lora_rank=16, max_length=512).check(empty, {"a": folder})
    with pytest.raises(ArtifactError, match=r"has rank 16\n  allowed: up to 8"):
        Vllm(max_lora_rank=8, max_length=512).check(empty, {"a": folder})
    with pytest.raises(ConfigError, match="more than LlamaForCausalLM has positions for"):
        Vllm(max_length=4096).check(empty, {})


CHILDREN = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(os.getpid(), child.pid, flush=True)
import time
time.sleep(600)
"""
PARENT = """
import os, sys
from lmray.engines import _process
from lmray.engines._process import ServerProcess
process = ServerProcess([sys.executable, "-c", sys.argv[1]], os.environ, name="test")
while not (said := os.pread(process._log.fileno(), 99, 0)).endswith(b"\\n"):
    pass
print(process._process.pid, said.decode(), flush=True)
"""


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "os._exit(0)", "process.close()"])
def test_nothing_of_the_process_outlives_whoever_started_it(end):
    command = [sys.executable, "-c", PARENT + end, CHILDREN]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    watcher, *pids = [int(word) for word in done.stdout.split()]
    assert len(pids) == 2, done.stderr
    assert ended(watcher), "the watcher is still there"
    assert all(map(ended, pids)), "what was killed takes a moment to be gone, and ends by itself only much later"


def ended(pid: int) -> bool:
    """Waits for a process that is none of this one's children."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([handle], [], [], 120)[0])
    finally:
        os.close(handle)


def test_a_process_that_ignores_its_end_is_killed():
    code = "import signal, sys, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    process = ServerProcess([sys.executable, "-c", code], os.environ, name="test")
    while not os.pread(process._log.fileno(), 9, 0):
        pass
    assert process.failure() is None
    process.close()
    assert process.failure() is not None


TALKATIVE = """
import os, sys, time
os.write(1, "".join(f"{line}\\n" for line in range(5000)).encode())
open(sys.argv[1]).read()
os.write(1, b"more\\n")
time.sleep(600)
"""


def test_of_a_log_that_grows_the_end_is_kept(tmp_path, monkeypatch):
    source = _process.WATCH.read_text(encoding="utf-8")
    for long, short in {"LOOK_S = 60.0": "LOOK_S = 0.01", "4_000_000, 100_000": "2000, 500"}.items():
        assert long in source
        source = source.replace(long, short)
    monkeypatch.setattr(_process, "WATCH", tmp_path / "watch.py")
    _process.WATCH.write_text(source, encoding="utf-8")
    os.mkfifo(tmp_path / "go")
    process = ServerProcess([sys.executable, "-c", TALKATIVE, str(tmp_path / "go")], os.environ, name="test")

    def said(last: bytes) -> bytes:
        deadline = time.monotonic() + 60
        while True:
            log = os.pread(process._log.fileno(), 10**6, 0)
            if log.endswith(last) and len(log) <= 2000:
                return log
            assert time.monotonic() < deadline, f"{len(log)} bytes"

    try:
        assert len(said(b"4999\n")) == 500
        (tmp_path / "go").write_text("")
        assert len(said(b"4999\nmore\n")) == 505, "it goes on where the log ends now"
    finally:
        process.close()
