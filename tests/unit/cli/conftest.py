from __future__ import annotations

from dataclasses import dataclass

import pytest

from lmray.cli import main


@dataclass(frozen=True)
class Spoken:
    """What a command said, and its exit code."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys):
    """Runs `lmray WORDS...` in this process."""

    def run(*words: str) -> Spoken:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main([str(word) for word in words])
        said = capsys.readouterr()
        return Spoken(int(left.value.code or 0), said.out, said.err)

    return run


@pytest.fixture
def train_file(tmp_path, tiny_model, tiny_data):
    """A job file that trains a tiny model."""
    path = tmp_path / "job.yaml"
    path.write_text(
        f"""
kind: train
name: 実験
model: {{source: {tiny_model}, dtype: float32}}
data:
  train: [{{source: {tiny_data}}}]
  eval: {{split: 0.25}}
  max_length: 256
method: sft
adapter: lora
sharding: single
train: {{max_steps: 4}}
output: {{artifact: 関数}}
""",
        encoding="utf-8",
    )
    return path
