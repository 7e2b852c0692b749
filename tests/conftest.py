"""What all tests share: a tiny model on disk, small data, and lmray's folders inside the test's own."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from matplotlib.figure import Figure
from xdist.scheduler import LoadScopeScheduling

from lmray.artifacts.files import write_json
from lmray.testing.jobs import tiny_rows, write_jsonl
from lmray.testing.tiny import tiny_model_folder

RAY_FOLDERS = ("on_ray", "e2e")
"""Tests of the first share a cluster, each of the second starts its own. One process of `make test` begins with the
first, the other with the second; both share what is left, so that they end together."""


class WholeFiles(LoadScopeScheduling):
    """A file's tests run in one process, which makes what they share once; those of a folder with Ray do, too."""

    def _split_scope(self, nodeid: str) -> str:
        return next((one for one in RAY_FOLDERS if nodeid.startswith(f"tests/{one}/")), super()._split_scope(nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return WholeFiles(config, log)


def pytest_collection_modifyitems(config, items):
    if hasattr(config, "workerinput"):  # one of several processes: the longest first
        items.sort(key=lambda item: not item.nodeid.startswith(tuple(f"tests/{one}/" for one in RAY_FOLDERS)))


# The same examples everywhere, however long they take: what fails is a change, not a machine.
settings.register_profile("suite", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_numbers():
    """Drawn by a test, whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _undrawn(request, monkeypatch):
    """Half the time of a tiny run goes into its pictures; tests of pictures, marked `draws`, have them drawn."""
    if request.node.get_closest_marker("draws") is None:
        monkeypatch.setattr(Figure, "savefig", _blank)


def _blank(figure: Figure, file, **how) -> None:
    begins = b"\x89PNG\r\n\x1a\n"
    file.write(begins) if hasattr(file, "write") else Path(file).write_bytes(begins)


@pytest.fixture(autouse=True)
def _hears_sigint():
    """A shell starts background commands deaf to SIGINT, and children inherit that; Ray Tune leaves a handler of its
    own."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _own_places(tmp_path, monkeypatch, request):
    """No test touches the user's store or cache. Tests with the shared cluster use the cluster's."""
    if "ray_cluster" not in request.fixturenames:
        monkeypatch.setenv("LMRAY_STORE", str(tmp_path / "store"))
        monkeypatch.setenv("LMRAY_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """Folder of a two-layer Llama over bytes."""
    return tiny_model_folder(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def quantised_model(tiny_model, tmp_path) -> Path:
    """Folder of a model whose config says that its weights were quantised before they were saved."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "quantised"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    return folder


@pytest.fixture(scope="session")
def wide_model(tmp_path_factory) -> Path:
    """The same with widths that NF4's blocks divide."""
    return tiny_model_folder(tmp_path_factory.mktemp("wide") / "model", hidden_size=64, intermediate_size=128)


@pytest.fixture
def matrix_model(tiny_model, wide_model) -> Callable[[str], Path]:
    """The model for an adapter of `lmray.testing.matrix`; skips the test where its library is not here."""

    def model(adapter: str) -> Path:
        if adapter != "qlora":
            return tiny_model
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, which `make test-full` installs")
        return wide_model

    return model


@pytest.fixture
def tiny_data(tmp_path) -> Path:
    """Prompt and completion rows, some in Japanese."""
    return write_jsonl(tmp_path / "データ.jsonl", tiny_rows())
