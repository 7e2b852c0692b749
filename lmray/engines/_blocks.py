"""Which block of the key-value cache belongs to whom: a state machine without tensors.

A block holds the keys and values of `block_size` tokens. Full blocks are known by a hash of all they follow from, so
that sequences with a common beginning share them (Kwon et al., "PagedAttention", arXiv 2309.06180, section 4). A shared
block is never written again: only full ones are shared, so nothing is ever copied.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b


def block_key(parent: bytes, tokens: Iterable[int]) -> bytes:
    """The name of a full block: of its tokens, and of the block before it, whose name `parent` is."""
    return blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


class BlockPool:
    """`num_blocks` blocks. Each is free, held by one sequence or more, or idle: held by none, its content still good.

    Idle blocks are given out again when no free one is left, the least recently used first.
    """

    def __init__(self, num_blocks: int):
        self.num_blocks = num_blocks
        self._free = list(reversed(range(num_blocks)))
        self._num_holders = [0] * num_blocks
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._by_key: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Blocks that can be taken."""
        return len(self._free) + len(self._idle)

    def take(self, count: int) -> list[int] | None:
        """`count` blocks for one holder, whose content is anything; None where fewer can be taken."""
        if count > self.num_free:
            return None
        taken = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._idle.popitem(last=False)
                del self._by_key[self._key_of.pop(block)]
            self._num_holders[block] = 1
            taken.append(block)
        return taken

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks of the first `keys`, up to one that is not there, held once more each."""
        found = []
        for key in keys:
            block = self._by_key.get(key)
            if block is None:
                break
            self._idle.pop(block, None)
            self._num_holders[block] += 1
            found.append(block)
        return found

    def keep(self, block: int, key: bytes) -> None:
        """Says what a held, full block holds. The first block of a key is the one that is found."""
        if key not in self._by_key and block not in self._key_of:
            self._by_key[key], self._key_of[block] = block, key

    def release(self, blocks: Sequence[int]) -> None:
        """One holder less for each of a sequence's `blocks`; later ones are given out again before earlier ones, which
        more sequences can begin with."""
        for block in reversed(blocks):
            self._num_holders[block] -= 1
            if self._num_holders[block] == 0:
                if block in self._key_of:
                    self._idle[block] = None
                else:
                    self._free.append(block)

    def forget(self, blocks: Iterable[int]) -> None:
        """From now on nobody finds held `blocks`."""
        for block in blocks:
            if (key := self._key_of.pop(block, None)) is not None:
                del self._by_key[key]
