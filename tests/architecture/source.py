"""The repository as text: which files it has, and their syntax trees."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = (".git", ".venv", ".hypothesis", "__pycache__", "build", "dist")
BINARY = (".png", ".safetensors", ".parquet", ".gguf", ".gz", ".zip", ".ico", ".woff2")


@cache
def files() -> tuple[Path, ...]:
    """Every file that is tracked or would be: what `git add .` sees."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    if listed.returncode == 0 and listed.stdout:
        found = [ROOT / name for name in listed.stdout.split("\0") if name]
        return tuple(sorted(path for path in found if path.is_file()))
    return tuple(sorted(_walk(ROOT)))


def _walk(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.name in SKIPPED or path.name.endswith(("_cache", ".egg-info")):
            continue
        yield from _walk(path) if path.is_dir() else [path]


def text_files() -> list[Path]:
    """`files()` without pictures, tensors and archives."""
    return [path for path in files() if path.suffix not in BINARY]


def python_files(*folders: str) -> list[Path]:
    """The Python files below `folders`, which are relative to the root."""
    return [path for path in files() if path.suffix == ".py" and any((ROOT / one) in path.parents for one in folders)]


def name_of(path: Path) -> str:
    """`path` relative to the root, with `/`."""
    return path.relative_to(ROOT).as_posix()


@cache
def tree_of(path: Path) -> ast.Module:
    """The syntax tree of `path`."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=name_of(path))


def docstrings(tree: ast.Module) -> set[ast.Constant]:
    """Every string that stands as a statement: docstrings, and the strings under fields."""
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }


def imported(node: ast.AST) -> list[str]:
    """Dotted names that an import statement brings in; empty for any other node and for relative imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []


def project() -> dict:
    """pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def floors() -> list[list[str]]:
    """The floors of pyproject.toml, highest first, each with its modules' names below `lmray`."""
    (contract,) = (one for one in project()["tool"]["importlinter"]["contracts"] if one["type"] == "layers")
    return [[name.strip(" ()") for name in layer.split("|")] for layer in contract["layers"]]


def python(code: str, *arguments: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a fresh interpreter at the root, so that it finds this tree's lmray."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=timeout_s
    )
