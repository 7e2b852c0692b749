"""Every wrong input ends with exit code 2 and a message that helps; nothing is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lmray.testing.jobs import write_jsonl


def edit(path, **changes) -> None:
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    for key, value in changes.items():
        *parents, last = key.split("__")
        holder = tree
        for parent in parents:
            holder = holder[parent]
        holder[last] = value
    path.write_text(yaml.safe_dump(tree, allow_unicode=True, sort_keys=False), encoding="utf-8")


def malformed_yaml(path, _tmp):
    path.write_text("kind: train\nname: [\n", encoding="utf-8")


def unknown_key(path, _tmp):
    edit(path, train__learning_rat=1e-4)


def missing_data_file(path, _tmp):
    edit(path, data__train=[{"source": "nope.jsonl"}])


def empty_data(path, tmp):
    edit(path, data__train=[{"source": str(write_jsonl(tmp / "empty.jsonl", []))}])


def a_row_of_the_wrong_shape(path, tmp):
    rows = [{"prompt": "a", "completion": "b", "topic": "c"}, {"prompt": "a", "completion": 7, "topic": "c"}]
    edit(path, data__train=[{"source": str(write_jsonl(tmp / "rows.jsonl", rows))}])


def zero_supervised_tokens(path, _tmp):
    edit(path, data__max_length=10)


def a_corrupted_model(path, tmp):
    model = tmp / "model"
    model.mkdir()
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    for file in Path(tree["model"]["source"]).iterdir():
        content = file.read_bytes()
        (model / file.name).write_bytes(content[: len(content) // 2] if file.suffix == ".safetensors" else content)
    edit(path, model__source=str(model))


def a_gpu_where_there_is_none(path, _tmp):
    edit(path, resources={"gpus_per_worker": 1})


def a_path_as_a_name(path, _tmp):
    edit(path, name="../escape")


def a_path_as_an_artifacts_name(path, _tmp):
    edit(path, output={"artifact": "../../escape"})


def an_unknown_model(path, _tmp):
    edit(path, model__source="./no-such-folder")


CASES = {
    malformed_yaml: ("train.yaml:", "malformed YAML"),
    unknown_key: ("train.learning_rat: unknown key", "did you mean `learning_rate`?"),
    missing_data_file: ("data source `nope.jsonl`", "no such file"),
    empty_data: ("empty.jsonl", "is empty"),
    a_row_of_the_wrong_shape: ("rows.jsonl:2: column `completion`", "holds a int"),
    zero_supervised_tokens: ("no supervised token", "hint:"),
    a_corrupted_model: ("model.safetensors", "is no whole safetensors file"),
    a_gpu_where_there_is_none: ("gpus_per_worker", "there is none"),
    a_path_as_a_name: ("name: '../escape' is not a name", "allowed:"),
    a_path_as_an_artifacts_name: ("output.artifact", "is not a name"),
    an_unknown_model: ("holds no model", "allowed:"),
}


ON_THEIR_OWN = {a_row_of_the_wrong_shape, a_gpu_where_there_is_none}
"""In a process of their own, the second because it is told once Ray runs."""


@pytest.mark.parametrize("spoil", CASES, ids=lambda case: case.__name__)
def test_wrong_jobs_cost_nothing(shell, train_file, tmp_path, spoil):
    spoil(train_file, tmp_path)
    run = shell.lmray if spoil in ON_THEIR_OWN else shell.lmray_here
    done = run("run", "train.yaml", "--json")
    for expected in CASES[spoil]:
        assert expected in done.stderr + done.stdout, done.stderr
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "store").rglob("*.*")), "nothing is written"
    assert not (tmp_path / "escape").exists()


def test_a_missing_job_file(shell):
    done = shell.lmray_here("run", "nope.yaml")
    assert done.returncode == 2 and "nope.yaml: cannot be read" in done.stderr


def test_unknown_artifacts_and_stages(shell):
    for arguments in (
        ("artifacts", "show", "nope"),
        ("artifacts", "promote", "nope", "production"),
        ("artifacts", "export", "../x", "out"),
        ("artifacts", "rollback", "nope", "production"),
    ):
        done = shell.lmray_here(*arguments)
        assert done.returncode == 2, (arguments, done.stderr)
        assert "error:" in done.stderr and "Traceback" not in done.stderr
