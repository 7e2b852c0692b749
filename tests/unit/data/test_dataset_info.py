"""LLaMA-Factory's data folders, read as they are."""

import json

import pytest

from lmray.config import Document, decode
from lmray.data.examples import read_examples
from lmray.data.spec import DataSpec
from lmray.errors import DataError
from lmray.testing.jobs import write_jsonl

ASKED, GOOD, BAD = ({"role": "user", "content": "2+2?"}, *({"role": "assistant", "content": text} for text in "45"))
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
ENTRIES = {
    "plain": {"file_name": "alpaca.jsonl"},
    "named": {"file_name": "sub/named.jsonl", "columns": {"prompt": "q", "query": "more", "response": "a"}},
    "in_folder": {"file_name": "named.jsonl", "folder": "sub", "columns": {"prompt": "q", "response": "a"}},
    "whole_folder": {"file_name": "sub", "columns": {"prompt": "q", "response": "a"}},
    "shared": {"file_name": "shared.jsonl", "formatting": "sharegpt", "columns": {"messages": "talk", "tools": "fs"}},
    "tagged": {"file_name": "tagged.jsonl", "formatting": "sharegpt", "columns": {"messages": "m"}, "tags": TAGS},
    "corpus": {"file_name": "corpus.txt", "columns": {"prompt": "text"}},
    "ranked": {
        "file_name": "ranked.jsonl",
        "ranking": True,
        "columns": {"prompt": "q", "chosen": "c", "rejected": "r"},
    },
    "ranked_turns": {"file_name": "ranked_turns.jsonl", "ranking": True, "formatting": "sharegpt"},
    "labelled": {"file_name": "kto.jsonl", "columns": {"prompt": "q", "response": "a", "kto_tag": "good"}},
    "labelled_turns": {
        "file_name": "kto.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "m", "kto_tag": "good"},
        "tags": TAGS,
    },
    "sampled": {"file_name": "alpaca.jsonl", "num_samples": 5},
    "nowhere": {"script_url": "x"},
    "pictures": {"file_name": "alpaca.jsonl", "columns": {"prompt": "q", "images": "i"}},
    "listed": {"file_name": "alpaca.jsonl", "columns": ["prompt"]},
    "odd": {"file_name": "alpaca.jsonl", "formatting": "sharegtp"},
    "odd_tag": {"file_name": "alpaca.jsonl", "formatting": "sharegpt", "tags": {"rol_tag": "x"}},
    "no_prompt": {"file_name": "alpaca.jsonl", "columns": {"response": "a"}},
    "gone": {"file_name": "gone.jsonl"},
    "hub": {"hf_hub_url": "owner/set", "subset": "part", "split": "test"},
    "cloud": {"cloud_file_name": "nope://bucket/x.jsonl"},
}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    shared = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]
    write_jsonl(folder / "alpaca.jsonl", [{"instruction": "2+2?", "input": "", "output": "4"}])
    write_jsonl(folder / "sub" / "named.jsonl", [{"q": "2+2?", "more": "", "a": "4"}])
    write_jsonl(folder / "shared.jsonl", [{"talk": shared, "fs": json.dumps([TOOL])}])
    write_jsonl(folder / "tagged.jsonl", [{"m": [ASKED, GOOD]}])
    (folder / "corpus.txt").write_text("読む", encoding="utf-8")
    write_jsonl(folder / "ranked.jsonl", [{"q": "2+2?", "c": "4", "r": "5"}])
    turns = {"conversations": shared[:1], "chosen": shared[1], "rejected": {"from": "gpt", "value": "5"}}
    write_jsonl(folder / "ranked_turns.jsonl", [turns])
    write_jsonl(folder / "kto.jsonl", [{"q": "2+2?", "a": "5", "m": [ASKED, BAD], "good": False}])
    (folder / "dataset_info.json").write_text(json.dumps(ENTRIES), encoding="utf-8")
    return folder


def read(folder, name, mapping=None):
    source = {"source": f"{folder}/dataset_info.json{name}", "mapping": mapping}
    return read_examples(decode(DataSpec, Document("test", {"train": [source]})), preferences=True)


@pytest.mark.parametrize("name", ["plain", "named", "in_folder", "whole_folder", "shared", "tagged"])
def test_entries_of_conversations(folder, name):
    (example,) = read(folder, f":{name}").train
    assert example.messages == (ASKED, GOOD)
    assert example.tools == ((TOOL,) if name == "shared" else None)


def test_an_entry_with_only_a_prompt_is_plain_text(folder):
    examples = read(folder, ":corpus")
    assert examples.train[0].text == "読む"
    assert examples.formats[0].endswith("dataset_info.json:corpus: text; 1 rows, 1 an epoch")


@pytest.mark.parametrize("name", ["ranked", "ranked_turns"])
def test_entries_of_pairs(folder, name):
    (example,) = read(folder, f":{name}").train
    assert (example.messages, example.rejected) == ((ASKED, GOOD), (ASKED, BAD))
    (chosen,) = read(folder, f":{name}", {"name": "preference", "use": "chosen"}).train
    assert chosen.messages == (ASKED, GOOD) and not chosen.is_preference


@pytest.mark.parametrize("name", ["labelled", "labelled_turns"])
def test_entries_of_labelled_answers(folder, name):
    (example,) = read(folder, f":{name}").train
    assert (example.messages, example.label) == ((ASKED, BAD), False)


@pytest.mark.parametrize(
    ("name", "where", "message", "hint"),
    [
        (":pln", "dataset_info.json", "defines no data set `pln`", "did you mean `plain`?"),
        ("", "dataset_info.json", "none is named", "dataset_info.json:NAME"),
        (":sampled", ": sampled", "num_samples", "weight"),
        (":nowhere", ": nowhere", "no place that lmray reads: script_url", "None"),
        (":pictures", ": pictures: columns", "`images` is not read", "text"),
        (":listed", ": listed: columns", "holds a list", "None"),
        (":odd", ": odd: formatting", "is 'sharegtp'", "did you mean `sharegpt`?"),
        (":odd_tag", ": odd_tag: tags", "`rol_tag` is not read", "did you mean `role_tag`?"),
        (":no_prompt", ": no_prompt: columns", "name no `prompt`", "None"),
        (":gone", "gone.jsonl", "no such file", "file"),
        (":cloud", "nope://bucket", "could not be downloaded", "network"),
    ],
)
def test_entries_that_cannot_be_read(folder, name, where, message, hint):
    with pytest.raises(DataError, match=message) as caught:
        read(folder, name)
    assert where in caught.value.where and hint in str(caught.value.hint)


def test_an_entry_says_itself_how_it_is_read(folder):
    for name, mapping in ((":plain", "columns"), (":plain", "preference"), (":ranked", "alpaca")):
        with pytest.raises(DataError, match="says itself how it is read"):
            read(folder, name, mapping)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no such file"), ("{", "no readable"), ("[]", "holds an empty list")]
)
def test_descriptions_that_are_none(tmp_path, content, message):
    if content is not None:
        (tmp_path / "dataset_info.json").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read(tmp_path, ":x")


def test_an_entry_on_the_hub_is_asked_for_by_its_id(folder, monkeypatch):
    asked = []
    monkeypatch.setattr("lmray.data.hub.open_dataset", lambda source: asked.append(source) or (iter(()), ""))
    with pytest.raises(DataError, match="is empty"):
        read(folder, ":hub")
    assert asked == ["hf:owner/set:part:test"]
