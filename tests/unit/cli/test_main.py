"""The command line as a whole: help, exit codes, where text goes, how errors look."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

import lmray
import lmray.on_ray.run
from lmray.cli import run as run_commands
from lmray.cli.output import table
from lmray.context import Result
from lmray.errors import CapacityError, RemoteError
from lmray.metrics.counter import Counter

COMMANDS = ("run", "submit", "jobs", "check", "show", "schema", "evaluate", "artifacts", "chat", "demo", "doctor")
COMMANDS += ("report", "bench")


def test_help_names_every_command_and_exits_0(cli):
    said = cli("--help")
    assert said.code == 0
    for command in COMMANDS:
        assert f"\n  {command} " in said.out
    assert cli("--version").out == lmray.__version__ + "\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(cli, command):
    said = cli(command, "--help")
    assert said.code == 0 and "Usage: lmray" in said.out


def test_help_brings_in_nothing_heavy():
    code = (
        "import sys\nfrom lmray.cli import main\n"
        "try:\n    main(['run', '--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'ray', 'transformers', 'numpy', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_unknown_command_is_wrong_input(cli):
    said = cli("trian")
    assert said.code == 2 and "No such command 'trian'" in said.err and said.out == ""


def test_a_missing_file_is_wrong_input_without_a_traceback(cli):
    said = cli("run", "nothing.yaml")
    assert (said.code, said.out) == (2, "")
    assert said.err == (
        "error: nothing.yaml: cannot be read: No such file or directory\n  hint: give the path of a job file\n"
    )


def test_with_json_an_error_is_one_object_on_stdout_too(cli, train_file):
    said = cli("run", train_file, "adaptr=1", "--json")
    assert said.code == 2 and "did you mean `adapter`?" in said.err
    printed = json.loads(said.out)
    assert printed["status"] == "failed" and "adaptr: unknown key" in printed["error"]


@pytest.fixture
def runner(monkeypatch):
    """Puts another function in the place of `lmray.on_ray.run.run`; gives the jobs it was called with."""

    def put(outcome):
        calls = []

        def run(job, again=None):
            calls.append(job)
            print("a library talks")
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        monkeypatch.setattr(lmray.on_ray.run, "run", run)
        return calls

    return put


def test_run_prints_the_result_and_nothing_else_with_json(cli, runner, train_file):
    calls = runner(Result("succeeded", "/store/runs/実験", "関数@12", {"eval.loss": 1.25, "eval.f1": 0.5}, 3.0))
    said = cli("run", train_file, "train.max_steps=7", "--json")
    assert said.code == 0 and calls[0].train.max_steps == 7
    assert json.loads(said.out) == {
        "status": "succeeded",
        "run": "/store/runs/実験",
        "artifact": "関数@12",
        "metrics": {"eval.loss": 1.25, "eval.f1": 0.5},
        "seconds": 3.0,
    }
    assert "実験" in said.out, "names stay readable"
    assert "a library talks" in said.err


def test_run_tells_people_how_it_ended(cli, runner, train_file):
    runner(Result("succeeded", "/store/runs/実験", "関数@12", {"eval.loss": 1.25, "eval.f1": 0.5}, 65.0))
    said = cli("run", train_file)
    assert "succeeded in 1 min 05 s" in said.out
    assert "artifact  関数@12" in said.out and "eval.loss  1.25" in said.out and "eval.f1    0.5" in said.out


def test_run_says_how_sure_a_gain_over_the_base_is(cli, runner, train_file):
    deltas = {"tuned": {"eval.loss": {"delta": -0.5, "low": -0.75, "high": -0.25, "num_examples": 6}}}
    runner(Result("succeeded", "/r", metrics={"eval.loss": 1.25, "base.loss": 1.75}, details={"deltas": deltas}))
    said = cli("run", train_file).out
    assert "eval.loss  1.25  (-0.5 [-0.75, -0.25] to base, 95 %)\n" in said and "base.loss  1.75\n" in said


@pytest.mark.parametrize(("status", "code"), run_commands.EXIT_CODES.items())
def test_the_exit_code_says_how_a_run_ended(cli, runner, train_file, status, code):
    runner(Result(status, "/store/runs/実験"))
    assert cli("run", train_file).code == code


@pytest.mark.parametrize(
    ("error", "code"),
    [(CapacityError("resources", "no GPU"), 2), (RemoteError("run", "broke"), 1), (KeyboardInterrupt(), 130)],
)
def test_what_stops_a_run_decides_the_exit_code(cli, runner, train_file, error, code):
    runner(error)
    said = cli("run", train_file, "--json")
    assert said.code == code
    assert json.loads(said.out)["status"] == ("stopped" if code == 130 else "failed")


def test_something_unexpected_is_one_line_and_a_way_to_see_more(cli, runner, train_file, monkeypatch):
    runner(ZeroDivisionError("Traceback ...\nthe last line\n"))
    said = cli("run", train_file)
    assert said.code == 1 and "Traceback" not in said.err
    assert "error: unexpected ZeroDivisionError: the last line" in said.err and "LMRAY_DEBUG=1" in said.err
    monkeypatch.setenv("LMRAY_DEBUG", "1")
    assert "Traceback (most recent call last)" in cli("run", train_file).err


def test_names_in_any_script_pass_through_a_latin_1_terminal(train_file):
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "lmray", "show", str(train_file)], capture_output=True, env=environment, check=False
    )
    assert done.returncode == 0 and "name: 実験" in done.stdout.decode("utf-8")


def test_jobs_run_py_is_lmray_run(train_file):
    script = lmray.__file__.replace("lmray/__init__.py", "jobs/run.py")
    done = subprocess.run(
        [sys.executable, script, str(train_file), "trian=1"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "did you mean `train`?" in done.stderr


@pytest.mark.parametrize("doing", ["read", "tokenise"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_data_is_prepared_ends_a_run_and_leaves_nothing_half_written(
    cli, train_file, tmp_path, monkeypatch, number, doing
):
    monkeypatch.setattr(Counter, "at", lambda self, done: os.kill(os.getpid(), number) if self.what == doing else None)
    said = cli("run", train_file, "--json")
    assert said.code == 130 and json.loads(said.out)["status"] == "stopped"
    kept = [path for path in (tmp_path / "cache" / "tokenised").glob("*") if path.suffix != ".lock"]
    assert kept == [] and not list((tmp_path / "cache").rglob("*.tmp")) and not (tmp_path / "store" / "runs").exists()


def test_a_table_aligns_wide_characters():
    assert table(("名前", "n"), [("a", 1), ("関数", 22)]).splitlines() == ["名前  n", "a     1", "関数  22"]
