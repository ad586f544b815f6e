"""Power of two choices: two of each sort are drawn, the better ones get the request.

Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 1996: nearly as even as looking at all, and
several routers with old news do not all run to the same worker.
"""

from __future__ import annotations

import random
from collections.abc import Iterable

from router.policies.fleet import Kind, Lane, Worker
from router.policies.least_loaded import fastest
from router.policies.search import Candidates, Choice, Search

NUM_CHOICES = 2
NUM_DRAWS = 8
"""Some that are drawn have no room."""


class PowerOfTwo:
    name = "power_of_two"

    def choose(self, search: Search, rng: random.Random) -> Choice | None:
        fleet = search.fleet
        prefills = self._draw(search, fleet.prefill_lanes.values(), rng, with_room=False)
        decodes = self._draw(search, fleet.decode_lanes.values(), rng, with_room=True)
        both = self._draw(search, search.local_lanes, rng, with_room=True)
        num_output = search.num_output_tokens

        def decodes_for(prefill: Worker) -> list[Candidates]:
            return ascending(
                (search.handover_s(prefill, decode) + search.step_s(decode) * num_output, decode) for decode in decodes
            )

        choice = search.cheapest(
            ascending((search.prefill_s(worker), worker) for worker in prefills),
            decodes_for,
            ascending((search.prefill_s(worker) + search.step_s(worker) * num_output, worker) for worker in both),
            "better_of_two",
        )
        return choice or fastest(search, "none_drawn_had_room")

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


def ascending(candidates: Candidates) -> list[Candidates]:
    """A list for each kind, the cheapest first; between equals by name."""
    by_kind: dict[Kind, list[tuple[float, str, Worker]]] = {}
    for cost, worker in candidates:
        by_kind.setdefault(worker.kind, []).append((cost, worker.incarnation, worker))
    for each in by_kind.values():
        each.sort()
    return [[(cost, worker) for cost, _, worker in each] for each in by_kind.values()]
