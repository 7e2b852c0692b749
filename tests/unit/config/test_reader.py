"""YAML as people write it in this field, and messages that lead to the line."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmray.config import read_document
from lmray.errors import ConfigError


def write(folder: Path, text: str, name: str = "job.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def read(folder: Path, text: str) -> dict:
    return read_document(write(folder, text)).tree


def refused(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read_document(path)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),
        ("2.0E+3", 2000.0),
        ("1.", 1.0),
        (".5", 0.5),
        ("-3", -3),
        ("1e5", 1e5),
        ("0", 0),
        ("true", True),
        ("False", False),
        ("on", "on"),
        ("yes", "yes"),
        ("off", "off"),
        ("~", None),
        ("null", None),
        ("", None),
        ("12:30", "12:30"),
        ("010", "010"),
        ("2024-01-01", "2024-01-01"),
        ("1.2.3", "1.2.3"),
        ("e5", "e5"),
        ("'3'", "3"),
        ("日本語", "日本語"),
    ],
)
def test_a_scalar_is_what_it_looks_like(tmp_path, text, value):
    found = read(tmp_path, f"key: {text}\n")["key"]
    assert found == value
    assert type(found) is type(value)


def test_every_key_remembers_its_line(tmp_path):
    path = write(tmp_path, "# a comment\nkind: train\ndata:\n  train:\n    - source: a\n    - {source: b}\n")
    document = read_document(path)
    assert document.where(("data", "train", 1, "source")) == f"{path}:6"
    assert document.where(("data", "train", 1, "missing")) == f"{path}:6"
    assert document.where(("nothing",)) == str(path)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: [1, 2\nb: 3\n", 2),
        ("a:\n  - 1\n b: 2\n", 3),
        ("a: 'open\n", 2),
        ("a: !!python/name:os.system x\n", 1),
        ("a: 1\n---\na: 2\n", 2),
    ],
)
def test_malformed_yaml_names_file_and_line(tmp_path, text, line):
    path = write(tmp_path, text)
    message = refused(path)
    assert message.startswith(f"{path}:{line}: malformed YAML")
    assert "hint:" in message


@pytest.mark.parametrize("text", ["a: !!int many\n", "a: &x [*x]\n"])
def test_yaml_that_no_value_can_be_made_of_is_malformed(tmp_path, text):
    assert "malformed YAML" in refused(write(tmp_path, text))


@pytest.mark.parametrize("character", ["\0", "\x1b", "\ufffe"])
def test_a_control_character_is_named_with_its_line(tmp_path, character):
    path = write(tmp_path, f"kind: train\nname: a{character}b\n")
    assert refused(path) == f"{path}:2: malformed YAML: holds the control character {character!r}\n  hint: remove it"


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    path = tmp_path / "bom.yaml"
    path.write_bytes(b"\xef\xbb\xbfkind: train\n")
    assert read_document(path).tree == {"kind": "train"}


def test_a_key_given_twice_names_both_lines(tmp_path):
    path = write(tmp_path, "train:\n  seed: 1\n  learning_rate: 1\n  seed: 2\n")
    assert refused(path) == f"{path}:4: `seed` is given twice\n  hint: it stands at {path}:2 already"


@pytest.mark.parametrize("text", ["- a\n- b\n", "only text\n", "3\n"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    assert "a job file is a mapping" in refused(write(tmp_path, text))


def test_an_empty_file_is_an_empty_mapping(tmp_path):
    assert read(tmp_path, "") == {}
    assert read(tmp_path, "# nothing\n") == {}


def test_a_file_that_cannot_be_read_says_why(tmp_path):
    assert "No such file" in refused(tmp_path / "missing.yaml")
    assert "Is a directory" in refused(tmp_path)
    path = tmp_path / "latin.yaml"
    path.write_bytes("name: caf\xe9\n".encode("latin-1"))
    assert refused(path) == f"{path}: is not UTF-8 at byte 9\n  hint: save it as UTF-8"


def test_a_child_is_laid_over_its_parent(tmp_path):
    write(tmp_path, "kind: train\nname: a\ntrain: {seed: 1, learning_rate: 2e-4}\nlist: [1, 2]\n", "base/parent.yaml")
    document = read_document(write(tmp_path, "extends: base/parent.yaml\nname: b\ntrain:\n  seed: 3\nlist: [9]\n"))
    assert document.tree == {"kind": "train", "name": "b", "train": {"seed": 3, "learning_rate": 2e-4}, "list": [9]}
    assert document.where(("train", "seed")).endswith("job.yaml:4")
    assert document.where(("train", "learning_rate")).endswith("parent.yaml:3")


def test_another_member_replaces_the_parents_and_the_same_one_keeps_its_fields(tmp_path):
    write(tmp_path, "method: {name: dpo, beta: 0.1}\nadapter: {name: lora, r: 8}\n", "parent.yaml")
    tree = read(tmp_path, "extends: parent.yaml\nmethod: {name: sft}\nadapter: {name: lora, lora_alpha: 4}\n")
    assert tree == {"method": {"name": "sft"}, "adapter": {"name": "lora", "r": 8, "lora_alpha": 4}}


def test_a_nested_job_extends_a_file_and_keeps_its_lines(tmp_path):
    write(tmp_path, "kind: train\nname: inner\ntrain: {seed: 1}\n", "train/demo.yaml")
    path = write(tmp_path, "kind: sweep\njob: {extends: ../train/demo.yaml, name: other}\n", "sweep/demo.yaml")
    document = read_document(path)
    assert document.tree == {"kind": "sweep", "job": {"kind": "train", "name": "other", "train": {"seed": 1}}}
    assert document.where(("job", "train", "seed")).endswith("demo.yaml:3")
    assert document.where(("job", "name")) == f"{path}:2"


def test_parents_have_parents(tmp_path):
    write(tmp_path, "a: 1\nb: 1\nc: 1\n", "one.yaml")
    write(tmp_path, "extends: one.yaml\nb: 2\nc: 2\n", "two.yaml")
    assert read(tmp_path, "extends: two.yaml\nc: 3\n") == {"a": 1, "b": 2, "c": 3}


def test_a_missing_parent_names_the_line(tmp_path):
    path = write(tmp_path, "kind: train\nextends: nowhere.yaml\n")
    expected = f"{path}:2: `extends` names a file that is not there: {tmp_path / 'nowhere.yaml'}"
    assert refused(path) == expected


def test_a_cycle_of_parents_is_refused(tmp_path):
    write(tmp_path, "extends: two.yaml\n", "one.yaml")
    write(tmp_path, "extends: job.yaml\n", "two.yaml")
    assert "leads back to this file" in refused(write(tmp_path, "extends: one.yaml\n"))
    assert "leads back to this file" in refused(write(tmp_path, "extends: self.yaml\n", "self.yaml"))


def test_an_alias_is_the_value_it_stands_for(tmp_path):
    assert read(tmp_path, "a: &x {r: 8}\nb: *x\n") == {"a": {"r": 8}, "b": {"r": 8}}
