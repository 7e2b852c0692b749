"""Sequences whose items are made when they are asked for are like any other."""

from __future__ import annotations

import numpy as np
import pytest

from lmray.data.lazy import LazySequence


class Squares(LazySequence[int]):
    def __init__(self):
        self.made: list[int] = []

    def __len__(self) -> int:
        return 5

    def item(self, index: int) -> int:
        self.made.append(index)
        return index * index


def test_it_is_indexed_sliced_and_walked_as_a_list_is():
    squares, as_list = Squares(), [0, 1, 4, 9, 16]
    for index in (0, 4, -1, -5, slice(1, 3), slice(None, None, -2), slice(-2, 99), slice(3, 1)):
        assert squares[index] == as_list[index]
    assert list(squares) == as_list and list(reversed(squares)) == as_list[::-1]
    assert squares[np.int64(-2)] == 9 and 16 in squares and squares.index(4) == 2


@pytest.mark.parametrize("index", [5, -6])
def test_what_is_not_there_is_no_item(index):
    squares = Squares()
    with pytest.raises(IndexError):
        squares[index]
    assert squares.made == []


def test_only_what_is_asked_for_is_made():
    squares = Squares()
    assert squares[3:] == [9, 16] and squares.made == [3, 4]
