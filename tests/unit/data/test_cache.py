"""Tokenised data is made once for what it depends on, and never trusted where it is not whole."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from transformers import ByT5Tokenizer

from lmray.config.places import cache_root
from lmray.data import cache
from lmray.data.base import Example
from lmray.data.cache import tokenise_cached, tokenizer_digest
from lmray.data.rules import Rules
from lmray.data.stored import examples_digest
from lmray.data.tokenise import tokenise_all
from lmray.errors import CapacityError, DataError
from lmray.testing.jobs import tiny_job, tiny_rows, write_jsonl
from lmray.testing.tiny import CHATML, tiny_tokenizer
from lmray.train.prepare import prepare

RULES = Rules(max_length=100)


def example(question: str, answer: str = "赤", **fields) -> Example:
    turns = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    return Example(turns, fields.pop("where", f"file:{len(question)}"), **fields)


EXAMPLES = [example("q" * count) for count in (1, 2, 3, 200)]


@pytest.fixture
def made(monkeypatch) -> list[int]:
    """One entry for each time that something was tokenised."""
    counted, tokenised_parts = [], cache.tokenised_parts

    def counting(tokenizer, examples, rules):
        counted.append(len(examples))
        return tokenised_parts(tokenizer, examples, rules)

    monkeypatch.setattr(cache, "tokenised_parts", counting)
    return counted


def entry():
    (folder,) = (path for path in (cache_root() / "tokenised").iterdir() if path.is_dir())
    return folder


def test_a_second_start_reads_what_the_first_made(made):
    first = tokenise_cached(tiny_tokenizer(), EXAMPLES, RULES)
    again = tokenise_cached(tiny_tokenizer(), EXAMPLES, RULES)
    assert made == [4]
    fresh = tokenise_all(tiny_tokenizer(), EXAMPLES, max_length=100, over_long="drop")
    assert list(first.examples) == list(again.examples) == list(fresh.examples)
    assert again.num_dropped == fresh.num_dropped == 1


def changed_template(tokenizer):
    tokenizer.chat_template = CHATML.replace("<|im_start|>", "<|im_start|> ")


@pytest.mark.parametrize(
    "change",
    [
        changed_template,
        lambda tokenizer: tokenizer.add_tokens(["qq"]),
        lambda tokenizer: setattr(tokenizer, "bos_token", "<|endoftext|>"),
    ],
    ids=["template", "vocabulary", "special tokens"],
)
def test_another_tokenizer_or_template_makes_it_anew(change, made):
    tokenise_cached(tiny_tokenizer(), EXAMPLES, RULES)
    tokenizer = tiny_tokenizer()
    change(tokenizer)
    found = tokenise_cached(tokenizer, EXAMPLES, RULES)
    assert len(made) == 2
    assert list(found.examples) == list(tokenise_all(tokenizer, EXAMPLES, max_length=100, over_long="drop").examples)


@pytest.mark.parametrize(
    "examples",
    [
        [*EXAMPLES[1:], EXAMPLES[0]],
        [example("Q"), *EXAMPLES[1:]],
        [replace(EXAMPLES[0], tools=({"name": "f"},)), *EXAMPLES[1:]],
        [Example((), "file:1", text="q"), *EXAMPLES[1:]],
    ],
    ids=["order", "a row", "tools", "text"],
)
def test_other_examples_make_it_anew(examples, made):
    tokenise_cached(tiny_tokenizer(), EXAMPLES, RULES)
    tokenise_cached(tiny_tokenizer(), examples, RULES)
    assert len(made) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 99},
        {"over_long": "truncate"},
        {"mask_history": True},
        {"stop_token_ids": (0,)},
        {"vocab_size": 264},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_rules_make_it_anew(change, made):
    tokenise_cached(tiny_tokenizer(), EXAMPLES, RULES)
    tokenise_cached(tiny_tokenizer(), EXAMPLES, replace(RULES, **change))
    assert len(made) == 2


def test_another_version_of_the_code_makes_it_anew(made, monkeypatch):
    tokenise_cached(tiny_tokenizer(), EXAMPLES, RULES)
    monkeypatch.setattr(cache, "VERSION", cache.VERSION + 1)
    tokenise_cached(tiny_tokenizer(), EXAMPLES, RULES)
    assert len(made) == 2


def test_the_same_rows_in_another_file_are_named_by_their_new_place(made):
    empty = Example(({"role": "user", "content": "?"},), "old.jsonl:1")
    tokenise_cached(tiny_tokenizer(), [*EXAMPLES, empty], RULES)
    found = tokenise_cached(tiny_tokenizer(), [*EXAMPLES, replace(empty, where="new.jsonl:1")], RULES)
    assert len(made) == 1
    assert found.num_empty == 1 and found.empty_rows == ("new.jsonl:1",)


def flip_a_byte(folder):
    part = folder / "part-00000.safetensors"
    content = bytearray(part.read_bytes())
    content[-3] ^= 1
    part.write_bytes(content)


def cut_off(folder):
    part = folder / "part-00000.safetensors"
    part.write_bytes(part.read_bytes()[:-10])


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_byte,
        cut_off,
        lambda folder: (folder / "part-00000.safetensors").unlink(),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "manifest.json").write_text("[]"),
        lambda folder: (folder / "manifest.json").write_text('{"files": []}'),
        lambda folder: (folder / "manifest.json").write_text('{"files": {}}'),
    ],
    ids=["byte", "cut", "no part", "no manifest", "list", "no files", "no facts"],
)
def test_an_entry_that_is_not_whole_is_made_again(damage, made):
    whole = list(tokenise_all(tiny_tokenizer(), EXAMPLES, max_length=100, over_long="drop").examples)
    assert list(tokenise_cached(tiny_tokenizer(), EXAMPLES, RULES).examples) == whole
    damage(entry())
    assert list(tokenise_cached(tiny_tokenizer(), EXAMPLES, RULES).examples) == whole
    assert len(made) == 2
    tokenise_cached(tiny_tokenizer(), EXAMPLES, RULES)
    assert len(made) == 2, "it is whole again"


def test_what_a_killed_process_left_is_cleared_away(made):
    tokenise_cached(tiny_tokenizer(), EXAMPLES, RULES)
    folder = entry()
    left = folder.rename(folder.with_name(f".{folder.name}.1-abcd.tmp"))
    (left / "manifest.json").unlink()
    assert len(tokenise_cached(tiny_tokenizer(), EXAMPLES, RULES).examples) == 3
    assert not left.exists() and len(made) == 2


def test_data_that_is_refused_leaves_nothing_behind():
    with pytest.raises(DataError, match="tokens long"):
        tokenise_cached(tiny_tokenizer(), EXAMPLES, replace(RULES, over_long="error"))
    assert [path for path in (cache_root() / "tokenised").iterdir() if path.is_dir()] == []


def test_many_parts_are_one_table_mapped_into_memory(monkeypatch):
    monkeypatch.setattr(cache, "PART_TOKENS", 40)
    monkeypatch.setattr("lmray.data.tokenise.CHUNK", 1)
    found = tokenise_cached(tiny_tokenizer(), EXAMPLES, RULES)
    assert len(list(entry().glob("part-*.safetensors"))) > 1
    assert list(found.examples) == list(
        tokenise_all(tiny_tokenizer(), EXAMPLES, max_length=100, over_long="drop").examples
    )
    assert not any(part.ids_N.flags.owndata for part in found.examples.parts)


def test_processes_that_start_together_make_it_once(made):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: tokenise_cached(tiny_tokenizer(), EXAMPLES, RULES), range(4)))
    assert made == [4]
    assert all(list(one.examples) == list(found[0].examples) for one in found)


def test_nothing_held_out_needs_no_entry(made):
    assert len(tokenise_cached(tiny_tokenizer(), [], RULES).examples) == 0
    assert made == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LMRAY_CACHE", str(tmp_path / "file"))
    with pytest.raises(CapacityError, match="cannot be kept") as caught:
        tokenise_cached(tiny_tokenizer(), EXAMPLES, RULES)
    assert "LMRAY_CACHE" in str(caught.value)


def test_digests_cover_content_and_nothing_else():
    assert examples_digest([example("q", where="a:1")]) == examples_digest([example("q", where="b:2")])
    assert tokenizer_digest(tiny_tokenizer()) == tokenizer_digest(tiny_tokenizer())


def test_a_tokenizer_written_in_python_has_a_digest_too():
    one, other = ByT5Tokenizer(), ByT5Tokenizer(extra_ids=3)
    assert not one.is_fast
    assert tokenizer_digest(one) == tokenizer_digest(ByT5Tokenizer()) != tokenizer_digest(other)


def test_the_second_start_of_a_job_does_not_tokenise(tiny_model, tiny_data, tmp_path, made):
    job = tiny_job(tiny_model, tiny_data, tmp_path / "store")
    first = prepare(job)
    assert made == [16, 8]
    again = prepare(job)
    assert made == [16, 8]
    assert list(again.rows) == list(first.rows) and list(again.eval_rows) == list(first.eval_rows)
    write_jsonl(tiny_data, [*tiny_rows()[:-1], {"prompt": "new", "completion": "row", "topic": "t0"}])
    prepare(job)
    assert len(made) > 2
