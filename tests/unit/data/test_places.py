import numpy as np
import pytest

from lmray.data.places import Places

TEXTS = ["a.jsonl:1", "a.jsonl:20", "hf:owner/name:train:3", "資料.csv:7", "a:007", "a:-1", "a:٣", "whole", ":5", ""]


def test_a_place_comes_back_as_it_was_written():
    places = Places.of(TEXTS)
    assert list(places) == TEXTS and places[-1] == "" and places[1:3] == TEXTS[1:3]
    with pytest.raises(IndexError):
        places[len(TEXTS)]


def test_files_are_named_once_and_places_are_chosen_by_number():
    places = Places.of(f"f:{row}" for row in range(1, 1000))
    assert list(places.names) == ["f"]
    assert list(places.chosen(np.array([4, 0, 4]))) == ["f:5", "f:1", "f:5"]
