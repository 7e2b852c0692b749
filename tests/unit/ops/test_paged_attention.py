"""Attention over blocks against one sequence at a time, in float64."""

from __future__ import annotations

import random

import torch

from lmray.ops.paged_attention import SPLIT_TOKENS, PagedAttention, make_groups, make_run

SIZE, DIM, NUM_KV, NUM_HEADS, SCALE = 4, 6, 2, 4, 0.3
LAYER = slice(4, 8)
"""Keys and values of the second of two layers."""


class Cache:
    """Blocks of two layers, and sequences with random keys and values in scattered blocks of the second."""

    def __init__(self, lengths: list[int]):
        torch.manual_seed(0)
        source = random.Random(0)
        num_blocks = sum(-(-length // SIZE) for length in lengths)
        free = source.sample(range(num_blocks), num_blocks)
        blocks = torch.zeros(8, num_blocks, SIZE * DIM, dtype=torch.float64)
        self.attention = PagedAttention(blocks, DIM)
        self.tables = [[free.pop() for _ in range(-(-length // SIZE))] for length in lengths]
        self.kv = [torch.randn(length, 2 * NUM_KV, DIM, dtype=torch.float64) for length in lengths]
        for table, kv in zip(self.tables, self.kv, strict=True):
            places = [table[place // SIZE] * SIZE + place % SIZE for place in range(len(kv))]
            self.attention.write(LAYER, kv, torch.tensor(places))

    def slow(self, q_HD: torch.Tensor, sequence: int, length: int) -> torch.Tensor:
        """What a query sees of the first `length` tokens of a sequence, [H D]."""
        k, v = self.kv[sequence][:length].split(NUM_KV, dim=1)
        heads = []
        for head, query in enumerate(q_HD):
            own = head // (NUM_HEADS // NUM_KV)
            heads.append((k[:, own] @ query * SCALE).softmax(0) @ v[:, own])
        return torch.cat(heads)


def test_one_token_each_of_sequences_of_any_length():
    lengths = [3, 70, 1, 8, 65, 4]
    cache = Cache(lengths)
    q = torch.randn(len(lengths), NUM_HEADS, DIM, dtype=torch.float64)
    groups = make_groups(lengths, cache.tables, SIZE, cache.attention.blocks_2KBE)
    assert sorted(row for group in groups for row in group.rows_n.tolist()) == list(range(len(lengths)))
    for group in groups:
        mixed = cache.attention.one_each(q, LAYER, group, SCALE)
        for row, found in zip(group.rows_n.tolist(), mixed, strict=True):
            assert torch.allclose(found, cache.slow(q[row], row, lengths[row]))


def test_short_sequences_get_a_group_of_their_own_where_much_padding_is_saved():
    long, tables = SPLIT_TOKENS, [list(range(SPLIT_TOKENS // SIZE))]
    like = torch.zeros(1)

    def split(lengths: list[int]) -> list[list[int]]:
        return [group.rows_n.tolist() for group in make_groups(lengths, tables * len(lengths), SIZE, like)]

    assert split([5, long, 6, long]) == [[1, 3], [0, 2]]
    assert split([long - SIZE, long]) == [[0, 1]]
    assert split([5, 40]) == [[0, 1]]
    assert split([]) == []


def test_a_run_sees_what_is_before_it_and_itself_up_to_each_token():
    cache = Cache([19, 7])
    for start, end, rows in ((0, 19, slice(0, 19)), (6, 15, slice(3, 12)), (16, 19, slice(0, 3))):
        qkv = torch.zeros(end - start, NUM_HEADS + 2 * NUM_KV, DIM, dtype=torch.float64)
        qkv[:, :NUM_HEADS] = torch.randn(end - start, NUM_HEADS, DIM, dtype=torch.float64)
        qkv[:, NUM_HEADS:] = cache.kv[0][start:end]
        run = make_run(rows, start, cache.tables[0], SIZE, torch.device("cpu"))
        mixed = cache.attention.run(qkv, LAYER, run, SCALE)
        expected = [cache.slow(qkv[place, :NUM_HEADS], 0, start + place + 1) for place in range(end - start)]
        assert torch.allclose(mixed, torch.stack(expected))


def test_other_layers_are_left_alone():
    cache = Cache([9])
    assert not cache.attention.blocks_2KBE[:4].any()
    assert cache.attention.blocks_2KBE[LAYER].any()


def test_blocks_that_are_cleared_hold_zeros_and_the_others_what_they_held():
    cache = Cache([9, 5])
    cache.attention.clear(LAYER, torch.tensor(cache.tables[0]))
    q = torch.randn(2, NUM_HEADS, DIM, dtype=torch.float64)
    [group] = make_groups([9, 5], cache.tables, SIZE, cache.attention.blocks_2KBE)
    mixed = cache.attention.one_each(q, LAYER, group, SCALE)
    assert not mixed[0].any()
    assert torch.allclose(mixed[1], cache.slow(q[1], 1, 5))
