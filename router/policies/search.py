"""The search for a route that every policy makes: who may, who has room, and which of them is cheapest."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Protocol

from core.messages import WorkerRole
from router.policies.cache_map import Levels
from router.policies.fleet import Fleet, Kind, Lane, Worker
from router.policies.model import CacheKind, Forecast, Need, Route

Candidates = Iterable[tuple[float, Worker]]
"""Workers and what each would cost, in whatever the policy minimises; the cheapest first."""
NO_LIMIT = float("inf")
NUM_HOLDERS = 3
"""Workers of each half that are looked at because they have some of the prompt: those that have most."""


@dataclass(frozen=True, slots=True)
class Choice:
    """`why`: one machine-readable word."""

    prefill: Worker
    decode: Worker
    why: str


@dataclass(slots=True, eq=False)  # not frozen: a dozen are made for each decision
class Offer:
    """The workers of a lane, each at a cost of `base + slope * load`; those loaded above `most` are left out."""

    lane: Lane
    base: float
    slope: float
    most: float = NO_LIMIT

    def of(self, search: Search, *, with_room: bool) -> Candidates:
        """Those that may be used, the least loaded first."""
        banned, base, slope, most = search.banned, self.base, self.slope, self.most
        num_blocks = search.num_blocks(self.lane.kind) if with_room else -NO_LIMIT
        for load, _, name, worker in self.lane.ranks:
            if load > most:
                return
            if worker.num_free_blocks >= num_blocks and name not in banned:
                yield base + slope * load, worker

    def first(self, search: Search, *, with_room: bool) -> float | None:
        """The cost of the first of them; None where there is none."""
        banned = search.banned
        num_blocks = search.num_blocks(self.lane.kind) if with_room else -NO_LIMIT
        for load, _, name, worker in self.lane.ranks:
            if load > self.most:
                return None
            if worker.num_free_blocks >= num_blocks and name not in banned:
                return self.base + self.slope * load
        return None


class Policy(Protocol):
    """Chooses among what has room. What it remembers is its own; it reads no clock and draws from `rng` only."""

    name: str

    def choose(self, search: Search, rng: random.Random) -> Choice | None:
        """None where nothing has room now."""


class Search:
    """One request looks for its route. `fleet` must be settled."""

    def __init__(self, need: Need, fleet: Fleet, *, longest: int, avoid: frozenset[str]) -> None:
        """`longest`: tokens that the longest route can hold. Workers in `avoid` are out of question."""
        self.need, self.fleet = need, fleet
        self.min_len = min(need.max_total_tokens, longest)
        self.banned = avoid | need.refused_by if need.refused_by else avoid
        self.num_output_tokens = min(fleet.output_tokens.value, need.max_total_tokens - need.num_tokens)
        self.epoch: Callable[[str, str], int | None] = fleet.epoch
        self._levels: dict[CacheKind, Levels] = {}
        self._cached: dict[Worker, int] = {}

    # ---- who is there

    def lanes(self, lanes: Mapping[Kind, Lane], role: WorkerRole | None = None) -> list[Lane]:
        """Those of `role` whose workers are long enough."""
        min_len = self.min_len
        return [
            lane
            for kind, lane in lanes.items()
            if lane.ranks and kind.max_model_len >= min_len and (role is None or kind.role is role)
        ]

    def prefills(self, role: WorkerRole | None = None, max_wait_s: float = NO_LIMIT) -> list[Offer]:
        """By when they would have read the prompt, in seconds from now, were nothing of it cached."""
        offers = []
        for lane in self.lanes(self.fleet.prefill_lanes, role):
            line = lane.kind.prefill
            most = max_wait_s / line.slope if line.slope > 0 else NO_LIMIT
            offers.append(Offer(lane, line.at(self.need.num_tokens), line.slope, most))
        return offers

    def decodes(self, role: WorkerRole | None = None) -> list[Offer]:
        """By how long they would write, in seconds."""
        num_output, offers = self.num_output_tokens, []
        for lane in self.lanes(self.fleet.decode_lanes, role):
            line = lane.kind.step
            offers.append(Offer(lane, line.at(1) * num_output, line.slope * num_output))
        return offers

    @property
    def local_lanes(self) -> list[Lane]:
        """Mixed workers, to which a policy may give both halves. Whether a decode worker does is decided afterwards."""
        return [] if self.need.mode == "require" else self.lanes(self.fleet.local_lanes, WorkerRole.MIXED)

    def both(self) -> list[Candidates]:
        """Of the workers that can do both, for each kind the one that would be done first, and when."""
        return [self._first_done(lane) for lane in self.local_lanes]

    def _first_done(self, lane: Lane) -> Candidates:
        """The lane's order is for an answer of usual length; of a shorter one the load weighs less, but for a share."""
        kind, num_tokens, num_output = lane.kind, self.need.num_tokens, self.num_output_tokens
        share = num_output / self.fleet.output_tokens.value if self.fleet.output_tokens.value > 0 else 1.0
        idle_s = kind.prefill.at(num_tokens) + kind.step.at(1) * num_output
        best: list[tuple[float, Worker]] = []
        for load, worker in Offer(lane, 0.0, 1.0).of(self, with_room=True):
            if best and idle_s + share * load >= best[0][0]:
                break
            busy_s = worker.num_waiting_tokens * kind.prefill.slope + worker.num_active * kind.step.slope * num_output
            if not best or idle_s + busy_s < best[0][0]:
                best = [(idle_s + busy_s, worker)]
        return best

    # ---- what they can do

    def may(self, worker: Worker) -> bool:
        """Whether the worker takes work, is long enough, and is not one to avoid."""
        return (
            worker.taking
            and worker.used_credits < worker.num_credits
            and worker.kind.max_model_len >= self.min_len
            and worker.incarnation not in self.banned
        )

    def has_blocks(self, worker: Worker) -> bool:
        """For the prompt and one token more."""
        return worker.num_free_blocks >= num_blocks_for(self.need.num_tokens + 1, worker.kind.block_size)

    def num_blocks(self, kind: Kind) -> int:
        return num_blocks_for(self.need.num_tokens + 1, kind.block_size)

    def connected(self, prefill: Worker, decode: Worker) -> bool:
        return self.fleet.epoch(prefill.incarnation, decode.incarnation) is not None

    def levels(self, cache: CacheKind) -> Levels:
        """Who has how much of the prompt, of all whose caches name blocks so."""
        known = self._levels.get(cache)
        if known is None:
            hashes = self.need.hashes.get(cache)
            known, fleet = (), self.fleet
            if hashes:
                known = fleet.caches.match(hashes, fleet.prefill_bits, fleet.decode_bits, NUM_HOLDERS)
            self._levels[cache] = known
        return known

    def num_cached(self, worker: Worker) -> int:
        """Tokens of the prompt that the worker is thought to have."""
        known = self._cached.get(worker)
        if known is None:
            known = self._cached[worker] = self._look_up(worker) * worker.kind.block_size
        return known

    def _look_up(self, worker: Worker) -> int:
        cache, bit = worker.kind.key.cache, worker.bit
        levels, hashes = self._levels.get(cache), self.need.hashes.get(cache)
        if not hashes or not bit or (levels and not levels[-1][1] & bit):
            return 0
        return self.fleet.caches.depth(bit, hashes)

    def note_cached(self, worker: Worker, num_blocks: int) -> None:
        """As `levels` has it."""
        self._cached[worker] = num_blocks * worker.kind.block_size

    # ---- what it would cost

    def prefill_s(self, worker: Worker) -> float:
        """Until the worker would have read the prompt, without what it has of it."""
        line = worker.kind.prefill
        num_tokens = self.need.num_tokens - self.num_cached(worker) + worker.num_waiting_tokens
        return line.intercept + line.slope * num_tokens

    def step_s(self, worker: Worker) -> float:
        """Between two tokens, with this request in the batch."""
        line = worker.kind.step
        return line.intercept + line.slope * (worker.num_active + 1)

    def handover_s(self, prefill: Worker, decode: Worker) -> float:
        """What the way from one worker to the other adds; nothing where they are the same."""
        if prefill is decode:
            return 0.0
        return prefill.kind.link(decode.kind).at(self.need.num_tokens - self.num_cached(decode))

    def forecast(self, prefill: Worker, decode: Worker) -> Forecast:
        ttft_s, itl_s = self.prefill_s(prefill), self.step_s(decode)
        finish_s = ttft_s + self.handover_s(prefill, decode) + itl_s * self.num_output_tokens
        return Forecast(ttft_s, itl_s, finish_s, self.num_cached(prefill), self.num_cached(decode))

    # ---- the cheapest

    def least(
        self, prefills: Iterable[Offer], decodes: Iterable[Offer], both: Iterable[Candidates], why: str
    ) -> Choice | None:
        """The least sum over pairs that are up, handover included, or the least of `both`, where that is less."""
        best: Choice | None = None
        best_cost = NO_LIMIT
        for lane in both:
            for cost, worker in lane:
                if cost < best_cost:
                    best, best_cost = Choice(worker, worker, why), cost
                break
        writers = self._heads(decodes, with_room=True)
        for cost, offer in self._heads(prefills, with_room=False) if writers else ():
            if cost + writers[0][0] >= best_cost:
                break
            found, best_cost = self._best_of_kind(offer, writers, best_cost)
            if found:
                best = Choice(*found, why)
        return best

    def _best_of_kind(
        self, readers: Offer, writers: list[tuple[float, Offer]], best_cost: float
    ) -> tuple[tuple[Worker, Worker] | None, float]:
        """The best pair whose prefill worker is one of `readers`, if it costs less than `best_cost`, and its cost.

        The first reader is paired with whom it is connected to, best first; whoever comes after it costs no less, so
        most often that is all. `writers` come with the cost of their best, the least first.
        """
        best, epoch = None, self.epoch
        link, num_tokens = readers.lane.kind.link, self.need.num_tokens
        handed = [(cost + link(each.lane.kind).at(num_tokens), each) for cost, each in writers]
        floor = min(cost for cost, _ in handed)
        for read_s, prefill in readers.of(self, with_room=False):
            if read_s + floor >= best_cost:
                break
            for (least, offer), (head, _) in zip(handed, writers, strict=True):
                if read_s + least >= best_cost:
                    continue
                extra = read_s + least - head
                for cost, decode in offer.of(self, with_room=True):
                    if extra + cost >= best_cost:
                        break
                    if epoch(prefill.incarnation, decode.incarnation) is not None:
                        best, best_cost = (prefill, decode), extra + cost
                        break
        return best, best_cost

    def _heads(self, offers: Iterable[Offer], *, with_room: bool) -> list[tuple[float, Offer]]:
        """Offers by the cost of their best worker; empty ones are left out."""
        heads = []
        for offer in offers:
            first = offer.first(self, with_room=with_room)
            if first is not None:
                heads.append((first, offer))
        heads.sort(key=itemgetter(0))
        return heads

    def cheapest(
        self,
        prefills: Iterable[Candidates],
        decodes: Callable[[Worker], Iterable[Candidates]],
        both: Iterable[Candidates],
        why: str,
        floor: float = 0.0,
    ) -> Choice | None:
        """The least sum over pairs that are up, or the least of `both`, where that is less.

        Candidates ascend, each kind in a list of its own. No decode worker costs less than `floor`; what it costs
        depends on the kind of the prefill worker only.
        """
        best: Choice | None = None
        best_cost = NO_LIMIT
        for lane in both:
            for cost, worker in lane:
                if cost < best_cost:
                    best, best_cost = Choice(worker, worker, why), cost
                break
        epoch = self.epoch
        for lane in prefills:
            least = floor  # of the decode workers, for prefill workers of this kind
            for cost, prefill in lane:
                if cost + least >= best_cost:
                    break
                firsts = []
                for others in decodes(prefill):
                    is_first = True
                    for more, decode in others:
                        if is_first:
                            firsts.append(more)
                            is_first = False
                        if cost + more >= best_cost:
                            break
                        if epoch(prefill.incarnation, decode.incarnation) is not None:
                            best, best_cost = Choice(prefill, decode, why), cost + more
                            break
                least = max(least, min(firsts, default=NO_LIMIT))
        return best


def wish(need: Need, fleet: Fleet, could_connect: Callable[[str, str], bool]) -> Route | None:
    """The best of the pairs that are not up but could be, had it been: one with room for `need` now."""
    fleet.settle()
    search = Search(need, fleet, longest=need.num_tokens + 1, avoid=need.avoid)
    search.epoch = lambda prefill, decode: 0 if could_connect(prefill, decode) else None
    choice = search.least(search.prefills(), search.decodes(), (), "wished")
    return None if choice is None else Route(choice.prefill.incarnation, choice.decode.incarnation)


def soonest_s(num_tokens: int, fleet: Fleet) -> float:
    """By when a prompt of so many tokens could be read if it were placed now, nothing of it cached."""
    fleet.settle()
    waits = (
        (lane.kind, lane.ranks[0][0] if lane.ranks else 0.0)
        for lane in fleet.prefill_lanes.values()
        if lane.kind.num_taking
    )
    return min((kind.prefill.at(num_tokens) + wait * kind.prefill.slope for kind, wait in waits), default=0.0)


def can_ever(need: Need, fleet: Fleet) -> bool:
    """Whether some route, with room or without, can hold the prompt and one token more."""
    return need.num_tokens + 1 <= fleet.longest_route(need.mode)


def num_blocks_for(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size)
