"""Which workers have which prefixes in their caches, as they tell it themselves."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise

from core.messages import CacheChanged

MAX_PROBES = 5
"""Blocks of a prompt that are looked up to tell workers apart, so that a match takes about the same time for any."""
NUM_SWEPT = 64
"""Entries rid of workers that are gone, with each block that comes."""

Levels = Sequence[tuple[int, int]]
"""`(number of blocks, bits of the workers that have at least so many)`, the most blocks first."""


class CacheMap:
    """Block hash -> set of workers, as bits of an int: a match costs the same for one worker and for a thousand.

    Holds `max_blocks` hashes at most; beyond, those told longest ago are forgotten. A bit is given to another worker
    only when no entry has it any more.
    """

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._holders: OrderedDict[bytes, int] = OrderedDict()
        self._bits: dict[str, int] = {}  # by incarnation
        self._names: list[str] = []  # by position of the bit
        self._alive = 0
        self._free: list[int] = []
        self._gone = 0  # bits that entries may still have
        self._leaving = 0  # those of them that the sweep under way takes out
        self._unswept: Iterator[bytes] = iter(())

    def __len__(self) -> int:
        return len(self._holders)

    def bit(self, incarnation: str) -> int:
        """Of a worker that has told of its cache; 0 for others."""
        return self._bits.get(incarnation, 0)

    def name(self, bit: int) -> str:
        """The worker whose bit this is."""
        return self._names[bit.bit_length() - 1]

    def apply(self, incarnation: str, event: CacheChanged) -> None:
        """What a worker says came and went."""
        if event.cleared:
            self.forget(incarnation)
        bit = self._bits.get(incarnation) or self._assign(incarnation)
        holders = self._holders
        for digest in event.removed:
            left = holders.get(digest, 0) & ~bit
            if left:
                holders[digest] = left
            else:
                holders.pop(digest, None)
        for digest in event.stored:
            holders[digest] = holders.get(digest, 0) | bit
            holders.move_to_end(digest)
        while len(holders) > self._max_blocks:
            holders.popitem(last=False)
        self._sweep(NUM_SWEPT * (1 + len(event.stored)))

    def forget(self, incarnation: str) -> None:
        """The worker is gone, or begins anew. Takes no time: its entries are swept up later."""
        bit = self._bits.pop(incarnation, 0)
        self._alive &= ~bit
        self._gone |= bit

    def depth(self, bit: int, hashes: Sequence[bytes]) -> int:
        """How many blocks of a prompt one worker has."""
        get, low, high = self._holders.get, 0, len(hashes)  # it has `low` blocks, and fewer than `high` + 1
        while low < high:
            middle = (low + high) // 2
            if get(hashes[middle], 0) & bit:
                low = middle + 1
            else:
                high = middle
        return low

    def match(self, hashes: Sequence[bytes], prefills: int, decodes: int, enough: int) -> Levels:
        """Who has how much of a prompt whose blocks are named `hashes`, down to `enough` workers of each half.

        The halves are `prefills` and `decodes`, bits of workers. Whoever has a block is taken to have those before it.
        Where more workers differ than can be looked up, some are said to have less than they do.
        """
        get, alive = self._holders.get, self._alive
        first = get(hashes[0], 0) & alive if hashes else 0
        if not first:
            return ()
        masks = {0: first}
        known = [0]  # positions looked up where somebody has the block; the last is the deepest
        low, high = 0, len(hashes)
        while high - low > 1:
            middle = (low + high) // 2
            if mask := get(hashes[middle], 0) & alive:
                masks[middle] = mask
                known.append(middle)
                low = middle
            else:
                high = middle
        levels = [(low + 1, masks[low])]
        num_left = MAX_PROBES
        spans = list(pairwise(known))
        while spans:
            low, high = spans.pop()
            above, below = masks[high], masks[low]
            if above == below:
                continue
            if (above & prefills).bit_count() >= enough and (above & decodes).bit_count() >= enough:
                break
            if high - low > 1 and num_left:
                num_left -= 1
                middle = (low + high) // 2
                masks[middle] = (get(hashes[middle], 0) & alive) | above
                spans.append((low, middle))
                spans.append((middle, high))
            else:
                levels.append((low + 1, below))
        if levels[-1][1] != first:
            levels.append((1, first))
        return levels

    # ---- bits

    def _assign(self, incarnation: str) -> int:
        if self._free:
            bit = self._free.pop()
            self._names[bit.bit_length() - 1] = incarnation
        else:
            bit = 1 << len(self._names)
            self._names.append(incarnation)
        self._bits[incarnation] = bit
        self._alive |= bit
        return bit

    def _sweep(self, num_entries: int) -> None:
        """Go on taking bits that are gone out of the entries; begin with those gone since, when that is done."""
        if not self._leaving:
            if not self._gone:
                return
            self._leaving, self._gone = self._gone, 0
            self._unswept = iter([*self._holders])
        holders, leaving, num_seen = self._holders, self._leaving, 0
        for digest in islice(self._unswept, num_entries):
            num_seen += 1
            mask = holders.get(digest, 0)
            if mask & leaving:
                if left := mask & ~leaving:
                    holders[digest] = left
                else:
                    del holders[digest]
        if num_seen < num_entries:
            self._free += bits_of(leaving)
            self._leaving = 0


def bits_of(mask: int) -> Iterator[int]:
    """Each bit that is set, the lowest first."""
    while mask:
        bit = mask & -mask
        yield bit
        mask ^= bit
