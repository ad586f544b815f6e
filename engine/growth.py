"""How many more blocks running requests will want: from how long outputs have been of late. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from itertools import accumulate
from math import ceil

from core.request import Request

NUM_BINS = 24
"""Of shares of what a request may draw; each ends at sqrt(2) times the one before, the last at all of it."""
FADE = 0.98
"""Weight of an output against the one that ended after it."""
QUANTILE = 0.75
"""Share of requests that are expected to end within what is foretold. Too little costs a copy, too much idle blocks."""

_ENDS: list[float] = [2.0 ** ((i + 1 - NUM_BINS) / 2) for i in range(NUM_BINS)]


class GrowthForecast:
    """Foretells how many more blocks requests that decode will want."""

    def __init__(self, block_size: int, max_model_len: int) -> None:
        self._block_size, self._max_model_len = block_size, max_model_len
        self._lengths = OutputLengths()

    def observe(self, request: Request) -> None:
        """The request has ended by itself. One that may draw a single token tells nothing of others."""
        allowed = num_allowed(request, self._max_model_len)
        if allowed > 1:
            self._lengths.observe(request.num_output_tokens, allowed)

    def num_blocks(self, requests: Iterable[tuple[Request, int]]) -> int:
        """The most that these are expected to hold at once beyond the blocks that each holds; if none, is about to get.

        Each that can is taken to grow by a block at least: who is let in does not have to give way at once.
        """
        growing = []
        for request, num_held in requests:
            num_blocks = num_held or self._num_blocks_for(request.num_tokens + 1)
            num_own = num_blocks - (request.num_cached_tokens or 0) // self._block_size
            growing.append((num_own, self._growth(request, num_blocks)))
        return peak_growth(growing)

    def _growth(self, request: Request, num_blocks: int) -> int:
        num_drawn, allowed = request.num_output_tokens, num_allowed(request, self._max_model_len)
        before = request.num_tokens - 1  # the last token is never computed
        expected = self._num_blocks_for(before + self._lengths.num_expected(num_drawn, allowed))
        most = self._num_blocks_for(before + max(0, allowed - num_drawn))
        return max(0, min(max(expected, num_blocks + 1), most) - num_blocks)

    def _num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)


def num_allowed(request: Request, max_model_len: int) -> int:
    """Tokens that the request may draw, those that it has drawn included."""
    return min(request.sampling.max_tokens, max_model_len - request.num_prompt_tokens)


class OutputLengths:
    """Foretells an output's length from its share of the allowed length, as others have turned out.

    A request is compared with those alone that came at least as far as it has. Where there are none it is taken to end
    soon: in the bin where it is.
    """

    def __init__(self) -> None:
        self._weights = [0.0] * NUM_BINS
        self._last = list(range(NUM_BINS))  # the bin in which one that has come to bin i is expected to end

    def observe(self, num_drawn: int, num_allowed: int) -> None:
        """A request has ended by itself after `num_drawn` of `num_allowed` tokens."""
        self._weights = [FADE * weight for weight in self._weights]
        self._weights[_bin(num_drawn, num_allowed)] += 1
        for first in range(NUM_BINS):
            wanted, last = QUANTILE * sum(self._weights[first:]), first
            while (wanted := wanted - self._weights[last]) > 0 and last + 1 < NUM_BINS:
                last += 1
            self._last[first] = last

    def num_expected(self, num_drawn: int, num_allowed: int) -> int:
        """Tokens that the request, which has drawn some, is still expected to draw: at least one, if it may."""
        if num_drawn >= num_allowed:
            return 0
        end = ceil(_ENDS[self._last[_bin(num_drawn + 1, num_allowed)]] * num_allowed)
        return min(end, num_allowed) - num_drawn


def peak_growth(requests: Iterable[tuple[int, int]]) -> int:
    """The most blocks that these will hold together beyond what they hold now.

    Of each: blocks that are free when it ends, and those by which it will have grown then. All grow at the same pace,
    but one may stand before the end of a block and another behind: so when some have grown by t blocks, those that grow
    by t - 1 are still there, and those that grow by less are not.
    """
    growing = sorted(requests, key=lambda request: request[1])
    growths = [growth for _, growth in growing]
    grown = [0, *accumulate(growths)]
    freed = [0, *accumulate(num_own for num_own, _ in growing)]
    peak = 0
    for level in {level for growth in growths for level in (growth, growth + 1)}:
        num_gone, num_full = bisect_left(growths, level - 1), bisect_left(growths, level)
        num_more = (len(growths) - num_full) * level + grown[num_full] - grown[num_gone] - freed[num_gone]
        peak = max(peak, num_more)
    return peak


def _bin(num_drawn: int, num_allowed: int) -> int:
    return min(bisect_left(_ENDS, num_drawn / num_allowed), NUM_BINS - 1)
