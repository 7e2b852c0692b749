"""Any format in, the same conversation out."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lmray.config import Document, decode
from lmray.data.examples import Examples, read_examples
from lmray.data.spec import DataSpec
from lmray.testing.jobs import write_jsonl

PAIRS = [("赤は英語で?", "red"), ('say "hi",\nplease', "hi"), ("空", " spaced "), ("x" * 40, "y")]
SYSTEM = "答えて"
CONVERSATIONS = [
    (
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    )
    for question, answer in PAIRS
]
MESSAGES = [{"messages": list(turns)} for turns in CONVERSATIONS]
SHAREGPT = [
    {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], "system": SYSTEM}
    for question, answer in PAIRS
]
ALPACA = [{"instruction": question, "input": "", "output": answer, "system": SYSTEM} for question, answer in PAIRS]
COLUMNS = [{"prompt": question, "completion": answer, "system": SYSTEM} for question, answer in PAIRS]
INSTANCES = [{"system": SYSTEM, "messages": list(turns[1:])} for turns in CONVERSATIONS]
BY_COLUMNS = {"name": "columns", "system": "system"}


def as_csv(path, rows):
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def as_json(path, rows):
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=2), encoding="utf-8")


def as_parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)


def in_cells(rows):
    return [{column: json.dumps(value, ensure_ascii=False) for column, value in row.items()} for row in rows]


def as_entry(path, rows):
    write_jsonl(path.parent / "rows.jsonl", rows)
    columns = {"prompt": "instruction", "query": "input", "response": "output", "system": "system"}
    shared = {"messages": "conversations", "system": "system"}
    entry = {"columns": columns} if "instruction" in rows[0] else {"formatting": "sharegpt", "columns": shared}
    as_json(path, {"set": {"file_name": "rows.jsonl", **entry}})


WAYS = {
    "messages.jsonl": (write_jsonl, MESSAGES, None),
    "messages.json": (as_json, MESSAGES, None),
    "messages.parquet": (as_parquet, MESSAGES, None),
    "messages.csv": (as_csv, in_cells(MESSAGES), None),
    "sharegpt.jsonl": (write_jsonl, SHAREGPT, None),
    "sharegpt.parquet": (as_parquet, SHAREGPT, None),
    "alpaca.json": (as_json, ALPACA, None),
    "alpaca.csv": (as_csv, ALPACA, None),
    "columns.csv": (as_csv, COLUMNS, BY_COLUMNS),
    "columns.parquet": (as_parquet, COLUMNS, BY_COLUMNS),
    "lmflow.json": (as_json, {"type": "conversation", "instances": INSTANCES}, None),
    "dataset_info.json": (as_entry, ALPACA, None),
    "shared/dataset_info.json": (as_entry, SHAREGPT, None),
}


def read(folder, way: str, **more) -> Examples:
    write, rows, mapping = WAYS[way]
    path = folder / way
    path.parent.mkdir(exist_ok=True)
    write(path, rows)
    source = f"{path}:set" if path.name == "dataset_info.json" else str(path)
    return read_examples(
        decode(DataSpec, Document("test", {"train": [{"source": source, "mapping": mapping}], **more}))
    )


@pytest.mark.parametrize("way", WAYS)
def test_the_same_conversations_give_the_same_examples(tmp_path, way):
    assert [example.messages for example in read(tmp_path, way).train] == CONVERSATIONS


@pytest.mark.parametrize("way", WAYS)
def test_the_same_conversations_give_the_same_split_and_digest(tmp_path, way):
    split = {"eval": {"split": 0.25}}
    assert read(tmp_path, way, **split).digest == read(tmp_path, "messages.jsonl", **split).digest
