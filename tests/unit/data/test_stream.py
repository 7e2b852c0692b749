"""Rows of a joined corpus: full, nothing lost, each token predicted once, found by their number."""

import numpy as np
import pytest

from lmray.data.batch import collate
from lmray.data.stream import Stream
from lmray.data.table import IGNORED, Part, Table, Tokenised

LENGTHS = (7, 3, 25, 2, 11)


def documents(lengths=LENGTHS) -> list[Tokenised]:
    """Every token another id, all of them supervised."""
    starts = np.cumsum([0, *lengths])
    ids = [np.arange(start, start + length) for start, length in zip(starts, lengths, strict=False)]
    return [Tokenised(one, one, f"doc:{number}") for number, one in enumerate(ids, 1)]


def naive_rows(ids: list[int], length: int) -> list[list[int]]:
    rows = []
    while len(ids) > 1:
        rows.append(ids[:length])
        ids = ids[length - 1 :]
    return rows


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("length", [8, 9, 16, 48, 100])
def test_rows_are_full_and_nothing_is_lost(length, apart):
    stream = Stream(documents(), max_length=length, apart=apart)
    got = [[int(token) for one in row for token in one.input_ids] for row in stream]
    assert got == naive_rows(list(range(sum(LENGTHS))), length)
    assert all(len(row) == length for row in got[:-1])


@pytest.mark.parametrize("length", [8, 9, 16, 100])
def test_each_token_but_the_first_is_predicted_once_by_the_one_before_it(length):
    predicted = []
    for row in Stream(documents(), max_length=length, apart=False):
        (one,) = row
        assert one.labels[1:].tolist() == [int(before) + 1 for before in one.input_ids[:-1]]
        predicted += one.labels[1:].tolist()
    assert predicted == list(range(1, sum(LENGTHS)))


@pytest.mark.parametrize("length", [8, 9, 16, 100])
def test_apart_no_document_predicts_another(length):
    rows = list(Stream(documents(), max_length=length, apart=True))
    firsts = np.cumsum([0, *LENGTHS])[:-1].tolist()
    predicted = [label for row in rows for one in row for label in one.labels[1:].tolist()]
    assert predicted == [token for token in range(sum(LENGTHS)) if token not in firsts]
    batch = collate(rows[:1], pad_token_id=0)
    assert [int(place) for place in batch.position_ids_BT[0][:8]] == [0, 1, 2, 3, 4, 5, 6, 0]


def test_a_row_says_where_it_was_made_of():
    assert Stream(documents(), max_length=9, apart=False)[0][0].where == "doc:1 to doc:2"
    assert [one.where for one in Stream(documents(), max_length=9, apart=True)[0]] == ["doc:1", "doc:2"]


def test_rows_of_a_table_on_disk_are_those_in_memory_and_found_by_number():
    table = Table([Part.of(documents()[:2], [0, 1]), Part.of(documents()[2:], [2, 3, 4])])
    of_table, of_list = (Stream(one, max_length=9, apart=False) for one in (table, documents()))
    assert list(of_table) == list(of_list) and of_table[-1] == of_list[len(of_list) - 1]
    assert of_table[1:3] == [of_list[1], of_list[2]]
    with pytest.raises(IndexError):
        of_table[len(of_table)]


def test_a_row_inside_a_long_prompt_teaches_nothing_and_is_left_out():
    prompt = Tokenised(np.arange(40), np.full(40, IGNORED), "chat:1")
    prompt.labels[-3:] = prompt.input_ids[-3:]
    rows = list(Stream([*documents((9,)), prompt], max_length=8, apart=False))
    assert all(sum(one.num_supervised for one in row) > 0 for row in rows)
    assert sum(one.num_supervised for row in rows for one in row) == 8 + 3
