from typer.testing import CliRunner

from lmray.cli.app import app
from lmray.errors import ConfigError


def test_an_unknown_benchmark_is_named_with_those_there_are():
    error = CliRunner().invoke(app, ["bench", "trein"]).exception
    assert isinstance(error, ConfigError)
    assert error.hint == "did you mean `train`?" and "train" in (error.allowed or "")


def test_what_follows_the_name_is_the_benchmarks_own(monkeypatch):
    called = []
    monkeypatch.setattr("lmray.cli.bench.subprocess.call", lambda command: called.append(command) or 3)
    result = CliRunner().invoke(app, ["bench", "train", "--steps", "5", "--out", "x.md"])
    assert result.exit_code == 3
    assert called[0][2:] == ["--steps", "5", "--out", "x.md"] and called[0][1].endswith("train.py")
