"""Round robin: each in turn, whatever its load."""

from __future__ import annotations

import bisect
import random
from collections.abc import Iterator, Sequence
from itertools import chain

from core.messages import WorkerRole
from router.policies.fleet import Worker
from router.policies.search import Choice, Search


class RoundRobin:
    """Goes round those that read prompts and round those that write tokens, each by name; a mixed worker does both."""

    name = "round_robin"

    def __init__(self) -> None:
        self._last_prefill = self._last_decode = ""

    def choose(self, search: Search, rng: random.Random) -> Choice | None:  # noqa: ARG002 - nothing is drawn
        fleet = search.fleet
        may_pair = True
        for name in after(self._last_prefill, fleet.prefill_names):
            prefill = fleet.workers[name]
            if not search.may(prefill):
                continue
            may_both = prefill.role is WorkerRole.MIXED and search.need.mode != "require"
            if may_both and search.has_blocks(prefill):
                return self._take(prefill, prefill)
            if may_pair:
                may_pair = False
                for other in after(self._last_decode, fleet.decode_names):
                    decode = fleet.workers[other]
                    if search.may(decode) and search.has_blocks(decode):
                        may_pair = True
                        if search.connected(prefill, decode):
                            return self._take(prefill, decode)
        return None

    def _take(self, prefill: Worker, decode: Worker) -> Choice:
        self._last_prefill, self._last_decode = prefill.incarnation, decode.incarnation
        return Choice(prefill, decode, "next_in_turn")


def after(last: str, names: Sequence[str]) -> Iterator[str]:
    """All names, from the one after `last` round to `last` itself."""
    start = bisect.bisect_right(names, last)
    return chain((names[i] for i in range(start, len(names))), (names[i] for i in range(start)))
