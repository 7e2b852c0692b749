"""From a plain tree to a frozen object, and back; all problems of a file in one error."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema
import pytest
from pydantic import Field, ValidationError

import lmray
from lmray.config import (
    Config,
    Document,
    Member,
    MemberConfig,
    Name,
    decode,
    dump,
    read_document,
    set_value,
    with_overrides,
)
from lmray.data.base import Mapping
from lmray.errors import ConfigError
from lmray.job import KINDS, TrainJob
from lmray.registry import MAPPINGS, Family

JOB = """\
kind: train
name: test
model: {source: smollm2-135m}
data:
  train:
    - {source: a.jsonl}
    - {source: b.jsonl, mapping: {prompt: question, completion: answer}}
  eval: {split: 0.2}
method: sft
adapter: {name: lora, r: 8, lora_alpha: 16}
sharding: {name: auto}
train:
  learning_rate: 2e-4
evaluate: {tasks: [loss]}
"""


class Inner(Config):
    number: int = 0
    mapping: Annotated[Mapping, Member(MAPPINGS, default="columns")] | None = None


class Outer(Config):
    name: Name = "x"
    inner: Inner = Inner()
    many: Annotated[tuple[Inner, ...], Field(min_length=1)] = (Inner(),)


def load(folder: Path, text: str = JOB, *overrides: str) -> Any:
    path = folder / "job.yaml"
    path.write_text(text, encoding="utf-8")
    return lmray.load(path, *overrides)


def problems(call, *arguments) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        call(*arguments)
    assert caught.value.exit_code == 2
    return [str(problem) for problem in caught.value.problems]


def of(tree: dict) -> list[str]:
    return problems(decode, Outer, Document("file", tree))


def test_a_job_decodes_and_goes_through_pickle_and_dump_unchanged(tmp_path):
    job = load(tmp_path)
    assert isinstance(job, TrainJob)
    assert job.train.learning_rate == 2e-4
    assert job.data.train[1].mapping.name == "columns"
    assert pickle.loads(pickle.dumps(job)) == job
    assert decode(TrainJob, Document("dump", dump(job))) == job
    assert dump(job)["adapter"] == {"name": "lora", **dump(job.adapter)}


def test_a_job_is_frozen(tmp_path):
    job = load(tmp_path)
    with pytest.raises(ValidationError):
        job.name = "other"
    with pytest.raises(ValidationError):
        job.adapter.r = 4


def test_all_problems_of_a_file_come_at_once_with_their_lines(tmp_path):
    text = JOB.replace("method: sft", "method: sfft").replace("r: 8,", "r: zero,")
    text = text.replace("learning_rate", "learning_rat").replace("name: test", "name: ../test")
    found = problems(load, tmp_path, text)
    where = [problem.splitlines()[0].removeprefix(str(tmp_path)) for problem in found]
    assert where == [
        "/job.yaml:2: name: '../test' is not a name",
        "/job.yaml:9: method: unknown method `sfft`",
        "/job.yaml:10: adapter.r: found 'zero' (str)",
        "/job.yaml:13: train.learning_rat: unknown key",
    ]


def test_an_unknown_key_names_the_keys_there_are_and_the_closest(tmp_path):
    (found,) = problems(load, tmp_path, JOB.replace("lora_alpha", "lora_alfa"))
    assert "adapter.lora_alfa: unknown key" in found
    assert "allowed: name, r, lora_alpha" in found
    assert "hint: did you mean `lora_alpha`?" in found


def test_an_unknown_key_deep_in_a_list_names_its_own_class():
    (found,) = of({"many": [{"number": 1}, {"mapping": {"promt": "q"}}]})
    assert found.splitlines() == [
        "file: many.1.mapping.promt: unknown key",
        "  allowed: name, prompt, completion, system",
        "  hint: did you mean `prompt`?",
    ]


def test_a_missing_key_says_to_add_it(tmp_path):
    (found,) = problems(load, tmp_path, JOB.replace("model: {source: smollm2-135m}\n", ""))
    assert found.endswith("model: is missing\n  hint: add `model:`")


@pytest.mark.parametrize(
    ("tree", "where", "found"),
    [
        ({"inner": {"number": "many"}}, "inner.number", "found 'many' (str)"),
        ({"inner": {"number": 1.5}}, "inner.number", "found 1.5 (float)"),
        ({"inner": {"number": None}}, "inner.number", "found None (NoneType)"),
        ({"inner": 3}, "inner", "found 3 (int)"),
        ({"many": ["x"]}, "many.0", "found 'x' (str)"),
        ({"many": []}, "many", "found [] (list)"),
        ({"many": "text"}, "many", "found 'text' (str)"),
        ({"inner": {"mapping": "colums"}}, "inner.mapping", "unknown data mapping `colums`"),
        ({"inner": {"mapping": 3}}, "inner.mapping", "names no data mapping: neither a name nor a mapping with `name`"),
        ({"inner": {"mapping": {"name": "{x}"}}}, "inner.mapping", "unknown data mapping `{x}`"),
    ],
)
def test_a_wrong_value_is_shown_with_its_type_and_what_is_allowed(tree, where, found):
    (problem,) = of(tree)
    assert problem.splitlines()[0] == f"file: {where}: {found}"
    assert "allowed:" in problem


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("adapter.r", True, "a valid integer"),
        ("adapter.lora_alpha", True, "a valid number"),
        ("adapter.layers_to_transform", [0, True], "a valid integer"),
        ("train.learning_rate", True, "a valid number"),
        ("train.max_steps", False, "a valid integer"),
        ("data.eval.split", False, "a valid number"),
        ("resources.step_timeout_s", True, "a valid number"),
    ],
)
def test_true_is_no_number(tmp_path, key, value, allowed):
    job = load(tmp_path)
    with pytest.raises(ConfigError, match=rf"{key}: found .*(True|False)") as caught:
        job.changed({key: value})
    assert caught.value.problems[0].allowed == allowed


def test_true_stays_what_it_is_where_it_may_stand():
    class One(Config):
        plain: bool
        either: bool | int
        word: Literal["auto", True] | float
        any: tuple[Any, ...]
        bounds: tuple[float, float] = (0, 1)

    found = One.model_validate({"plain": True, "either": True, "word": True, "any": [True, 1]})
    assert (found.plain, found.either, found.word, found.any) == (True, True, True, (True, 1))
    with pytest.raises(ValidationError, match="valid number"):
        One.model_validate({**found.model_dump(), "bounds": [False, True]})


def test_text_where_a_mapping_belongs_is_told_its_keys():
    assert of({"inner": "x"}) == ["file: inner: found 'x' (str)\n  allowed: a mapping with number, mapping"]


def test_a_wrong_item_does_not_also_make_its_list_too_short():
    assert [problem.splitlines()[0] for problem in of({"many": [{"number": "x"}]})] == [
        "file: many.0.number: found 'x' (str)"
    ]


def test_a_long_value_is_cut_short():
    (problem,) = of({"inner": "x" * 500})
    assert len(problem.splitlines()[0]) < 100


@pytest.mark.parametrize("name", ["関数呼び出し", "été", "a.b_c-d", "1", "x" * 64])
def test_names_may_be_of_any_script(name):
    assert decode(Outer, Document("file", {"name": name})).name


@pytest.mark.parametrize("name", ["", "a/b", "../up", "..", ".hidden", "a b", "-x", "x" * 65, "a\n", "a\\b", "a:b"])
def test_names_that_would_leave_their_folder_are_refused(name):
    (problem,) = of({"name": name})
    assert "is not a name" in problem
    assert "allowed: 1 to 64 letters" in problem


def test_two_spellings_of_one_name_are_one():
    composed, decomposed = "\u304c", "\u304b\u3099"
    made = [decode(Outer, Document("file", {"name": name})) for name in (composed, decomposed)]
    assert made[0] == made[1]


def test_a_member_of_another_family_is_refused(tmp_path):
    job = load(tmp_path)
    with pytest.raises(ValidationError):
        TrainJob.model_validate({**dump(job), "method": job.adapter})
    assert TrainJob.model_validate({**dump(job), "method": job.method}) == job


@pytest.mark.parametrize("text", ["", "name: x\n"])
def test_a_file_without_kind_names_the_kinds(tmp_path, text):
    (found,) = problems(load, tmp_path, text)
    assert "has no `kind`" in found
    assert "allowed: " + ", ".join(KINDS) in found


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_a_generator_would_refuse_later_is_refused(tmp_path, seed):
    (found,) = problems(load, tmp_path, JOB, f"train.seed={seed}")
    assert f"train.seed: found {seed} (int)" in found and "allowed:" in found
    assert load(tmp_path, JOB, f"train.seed={2**32 - 1}").train.seed == 2**32 - 1


def test_an_unknown_kind_is_hinted_at(tmp_path):
    (found,) = problems(load, tmp_path, JOB.replace("kind: train", "kind: trian"))
    assert "job.yaml:1: kind: unknown kind `trian`" in found
    assert "hint: did you mean `train`?" in found
    (found,) = problems(load, tmp_path, JOB.replace("kind: train", "kind: [train]"))
    assert "job.yaml:1: kind: unknown kind `['train']`" in found


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.learning_rate=1e-3", ("train", "learning_rate"), 1e-3),
        ("train.seed=7", ("train", "seed"), 7),
        ("name=日本語", ("name",), "日本語"),
        ("storage=on", ("storage",), "on"),
        ("storage=a=b", ("storage",), "a=b"),
        ("data.max_length= 64", ("data", "max_length"), 64),
        ("data.train.1.weight=2.5", ("data", "train", 1, "weight"), 2.5),
        ("adapter={name: lora, r: 4}", ("adapter", "r"), 4),
        ("resources.workers=2", ("resources", "workers"), 2),
    ],
)
def test_an_override_is_laid_over_the_file(tmp_path, override, key, value):
    tree: Any = dump(load(tmp_path, JOB, override))
    for part in key:
        tree = tree[part]
    assert tree == value


def test_an_override_of_a_members_field_keeps_the_member(tmp_path):
    job = load(tmp_path, JOB.replace("{name: lora, r: 8, lora_alpha: 16}", "lora"), "adapter.r=4")
    assert (job.adapter.name, job.adapter.r) == ("lora", 4)
    assert load(tmp_path, JOB, "adapter.r=2").adapter.lora_alpha == 16


@pytest.mark.parametrize("override", ["train.seed", "=3", "train..seed=3", ".seed=3"])
def test_an_override_that_is_no_assignment_is_refused(tmp_path, override):
    (found,) = problems(load, tmp_path, JOB, override)
    assert found.startswith(f"override `{override}`: is not `key=value`")


@pytest.mark.parametrize("text", ["[1", "'open", "{a: 1", "!!int x", "*nothing"])
def test_an_override_of_malformed_yaml_names_itself(tmp_path, text):
    (found,) = problems(load, tmp_path, JOB, f"train.seed={text}")
    assert found.startswith(f"override `train.seed={text}`: malformed YAML")


def test_a_wrong_override_names_itself_as_the_place(tmp_path):
    (found,) = problems(load, tmp_path, JOB, "train.sed=3")
    assert found.startswith("override `train.sed=3`: train.sed: unknown key")
    (found,) = problems(load, tmp_path, JOB, "data.train.7.weight=3")
    assert "`7` is no place in a list of 2" in found


def test_overrides_leave_the_document_they_came_from_alone():
    document = Document("file", {"a": {"b": [{"c": 1}]}})
    changed = with_overrides(document, ["a.b.0.c=2", "a.d=3"])
    assert document.tree == {"a": {"b": [{"c": 1}]}}
    assert changed.tree == {"a": {"b": [{"c": 2}], "d": 3}}
    assert set_value(document, ("a", "b"), [], "here").tree == {"a": {"b": []}}


def test_changed_decodes_afresh(tmp_path):
    job = load(tmp_path)
    assert job.changed({"adapter.r": 4, "train.seed": 5}).adapter.r == 4
    assert job.adapter.r == 8
    assert problems(job.changed, {"adapter.r": 0})[0].startswith("job `test`: adapter.r: found 0 (int)")


@pytest.mark.parametrize(
    "change", [{"nmae": 1}, {"kind": "other"}, {"adapter": {"name": "lora", "r": 0}}, {"method": "x"}]
)
def test_the_json_schema_refuses_what_decoding_refuses(tmp_path, change):
    load(tmp_path)
    tree = read_document(tmp_path / "job.yaml").tree
    check = jsonschema.Draft202012Validator(TrainJob.model_json_schema())
    assert check.is_valid(tree)
    assert not check.is_valid({**tree, **change})


def test_the_json_schema_of_a_member_with_parts_resolves(tmp_path, monkeypatch):
    folder = tmp_path / "family_with_parts"
    folder.mkdir()
    (folder / "__init__.py").write_text("", encoding="utf-8")
    part, whole = "class Part(Config):\n    size: int\n", "class Whole(MemberConfig):\n    part: Part\n"
    (folder / "whole.py").write_text("from lmray.config import Config, MemberConfig\n" + part + whole, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))

    class Owner(Config):
        member: Annotated[MemberConfig, Member(Family("family_with_parts", "whole"))]

    check = jsonschema.Draft202012Validator(Owner.model_json_schema())
    assert check.is_valid({"member": {"name": "whole", "part": {"size": 3}}})
    assert not check.is_valid({"member": {"name": "whole", "part": {"size": "x"}}})
    assert not check.is_valid({"member": {"part": {"size": 3}}})


def test_the_json_schema_carries_the_strings_under_fields():
    schema = TrainJob.model_json_schema()
    assert "Optimizer steps" in schema["$defs"]["TrainArgs"]["properties"]["max_steps"]["description"]
