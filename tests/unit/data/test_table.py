import numpy as np
import pytest

from lmray.data.places import Places
from lmray.data.table import IGNORED, Part, Table, Tokenised


def example(*ids: int) -> Tokenised:
    return Tokenised(np.array(ids), np.array([IGNORED, *ids[1:]]))


PARTS = [Part.of([example(1, 2), example(3)], [0, 0]), Part.of([], []), Part.of([example(4, 5, 6)], [1])]


def test_examples_of_several_parts_are_one_sequence():
    table = Table(PARTS)
    assert list(table) == [example(1, 2), example(3), example(4, 5, 6)]
    assert table[-1] == table[2] and table[1:] == [table[1], table[2]]
    assert table.lengths.tolist() == [2, 1, 3]
    for beyond in (3, -4):
        with pytest.raises(IndexError):
            table[beyond]


def test_examples_say_what_they_were_made_of():
    table = Table(PARTS, Places.of(["file:1", "file:2"]))
    assert [one.where for one in table] == ["file:1", "file:1", "file:2"]
    assert [one.where for one in Table(PARTS)] == ["", "", ""]
    joined = Table([Part.joined(PARTS)], table.places)
    assert list(joined) == list(table) and [one.where for one in joined] == [one.where for one in table]


def test_a_table_may_be_empty():
    assert list(Table([])) == [] and Table([]).lengths.tolist() == []


def test_tokens_take_four_bytes_each_and_are_not_copied():
    table = Table([Part.of([example(1, 2, 3)] * 100, range(100))])
    (part,) = table.parts
    assert part.ids_N.nbytes + part.labels_N.nbytes == 100 * 3 * 8
    assert np.shares_memory(table[50].input_ids, part.ids_N)


def test_examples_are_equal_by_content():
    assert example(1, 2) == example(1, 2)
    assert example(1, 2) != example(1, 3)
    assert example(1, 2) != Tokenised((1, 2), (1, 2))
    assert example(1, 2) != "something else"
