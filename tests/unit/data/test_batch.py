import torch
from hypothesis import given
from hypothesis import strategies as st

from lmray.data.batch import collate, pack
from lmray.data.sampler import Sampler
from lmray.data.tokenise import IGNORED, Tokenised


def example(length: int, start: int = 10) -> Tokenised:
    ids = tuple(range(start, start + length))
    return Tokenised(ids, (IGNORED,) * (length // 2) + ids[length // 2 :])


@given(st.lists(st.integers(2, 30), min_size=1, max_size=60))
def test_packing_keeps_every_example_once_within_the_length(lengths):
    examples = [example(length, start=1000 * index) for index, length in enumerate(lengths)]
    rows = pack(examples, max_length=30)
    assert sorted(one.input_ids[0] for row in rows for one in row) == [one.input_ids[0] for one in examples]
    assert all(sum(map(len, row)) <= 30 for row in rows)
    full = sum(lengths) / 30
    assert len(rows) <= 2 * full + 1, "no two rows would fit into one"


def test_packed_rows_count_positions_anew_and_supervise_no_first_token():
    everything = Tokenised((5, 6), (5, 6))
    batch = collate([(example(3), everything), (example(4),)], pad_token_id=0)
    assert batch.position_ids_BT.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert batch.labels_BT.tolist() == [[IGNORED, 11, 12, IGNORED, 6], [IGNORED, IGNORED, 12, 13, IGNORED]]
    assert (batch.num_supervised, batch.num_tokens) == (5, 9)
    assert batch.num_supervised == int((batch.labels_BT != IGNORED).sum())


def test_single_rows_are_padded_with_positions_going_on():
    batch = collate([(example(2),), (example(4),)], pad_token_id=7)
    assert batch.input_ids_BT.tolist() == [[10, 11, 7, 7], [10, 11, 12, 13]]
    assert batch.position_ids_BT.tolist() == [[0, 1, 2, 3]] * 2


def test_batches_move_whole():
    batch = collate([(example(2),)], pad_token_id=0).to("meta")
    assert batch.input_ids_BT.device == torch.device("meta") and batch.num_tokens == 2


def test_the_sampler_shows_each_row_once_an_epoch_in_an_order_that_only_the_seed_changes():
    sampler = Sampler(10, seed=3)
    epochs = [sampler.rows(start, start + 10) for start in (0, 10)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert epochs[0] != epochs[1] and epochs[0] != Sampler(10, seed=4).rows(0, 10)
    assert sampler.rows(7, 13) == epochs[0][7:] + epochs[1][:3]
