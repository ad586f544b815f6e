"""Power of two choices: two of each sort are drawn, the better ones get the request.

Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 1996: nearly as even as looking at all, and
several routers with old news do not all run to the same worker.
"""

from __future__ import annotations

import random
from collections.abc import Iterable

from router.policies.best_of import best_of
from router.policies.fleet import Lane, Worker
from router.policies.least_loaded import fastest
from router.policies.search import Choice, Search

NUM_CHOICES = 2
NUM_DRAWS = 8
"""Some that are drawn have no room."""


class PowerOfTwo:
    name = "power_of_two"

    def choose(self, search: Search, rng: random.Random) -> Choice | None:
        fleet, num_output = search.fleet, search.num_output_tokens
        both = self._draw(search, search.local_lanes, rng, with_room=True)
        prefills = self._draw(search, fleet.prefill_lanes.values(), rng, with_room=False)
        decodes = self._draw(search, fleet.decode_lanes.values(), rng, with_room=True)
        read_s = {worker: search.prefill_s(worker) for worker in (*both, *prefills)}
        write_s = {worker: search.step_s(worker) * num_output for worker in (*both, *decodes)}
        return best_of(search, read_s, write_s, "better_of_two") or fastest(search, "none_drawn_had_room")

    def _draw(self, search: Search, lanes: Iterable[Lane], rng: random.Random, *, with_room: bool) -> list[Worker]:
        ranks = [lane.ranks for lane in lanes if lane.ranks]
        drawn: dict[str, Worker] = {}
        total = sum(map(len, ranks))
        for _ in range(min(NUM_DRAWS, 4 * total)):
            index = int(rng.random() * total)
            for each in ranks:
                if index < len(each):
                    worker = each[index][3]
                    if search.may(worker) and (not with_room or search.has_blocks(worker)):
                        drawn[worker.incarnation] = worker
                    break
                index -= len(each)
            if len(drawn) == NUM_CHOICES:
                break
        return [*drawn.values()]
