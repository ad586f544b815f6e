"""The workers as placement sees them, kept in order of load so that the best is found without looking at all."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from core.messages import CacheChanged, WorkerRole
from core.request import Disaggregation
from router.policies.cache_map import CacheMap
from router.policies.model import CacheKind, Route
from router.policies.speeds import Average, Line

PREFILL_LINE = (0.005, 1e-4, 512.0)
"""Seconds to read a prompt by its tokens, before any was measured: intercept, slope, usual number of tokens."""
STEP_LINE = (0.01, 5e-4, 16.0)
"""Seconds of a step by the requests in its batch."""
HANDOVER_LINE = (0.005, 1e-5, 512.0)
"""Seconds that a pair adds, by the tokens sent: reserving, and what of the transfer is not hidden."""
USUAL_BATCH = 8
"""Requests that share a step."""
OUTPUT_TOKENS = 128.0
"""Length of an answer, before any has ended."""


@dataclass(frozen=True, slots=True)
class KindKey:
    """Workers of one kind differ in nothing but their load."""

    role: WorkerRole
    device: str
    cache: CacheKind
    max_model_len: int
    runs_alone: bool = False


@dataclass(slots=True, eq=False)
class Kind:
    """What is known of all workers of a kind together: how fast they are, and where each stands in order of load.

    Speeds are kept when the last worker is gone. `links` are to kinds of decode workers: what a pair adds, in seconds
    by tokens sent.
    """

    key: KindKey
    role: WorkerRole
    block_size: int
    max_model_len: int
    alone: bool
    """Its workers can do both halves of a request."""
    prefill: Line = field(default_factory=lambda: Line(*PREFILL_LINE))
    step: Line = field(default_factory=lambda: Line(*STEP_LINE))
    links: dict[Kind, Line] = field(default_factory=dict)
    num_taking: int = 0
    """Workers of this kind that take work."""

    def link(self, decode: Kind) -> Line:
        line = self.links.get(decode)
        if line is None:
            line = self.links[decode] = Line(*HANDOVER_LINE)
        return line


@dataclass(slots=True, eq=False)
class Worker:
    """A connected worker: what it last said, less what was asked of it since.

    From what is reported, used and pending follow `num_free_blocks` and the like, in `Fleet.settle`. `bit` is its place
    in the cache map while it takes work, `places` are those in the order of load.
    """

    incarnation: str
    kind: Kind
    num_credits: int
    reported_free_blocks: int = 0
    reported_active: int = 0
    reported_waiting_tokens: int = 0
    used_credits: int = 0
    pending_tokens: int = 0
    pending_blocks: int = 0
    taking: bool = True
    num_free_blocks: int = 0
    num_active: int = 0
    num_waiting_tokens: int = 0
    bit: int = 0
    places: list[tuple[Lane, Rank]] = field(default_factory=list)

    @property
    def role(self) -> WorkerRole:
        return self.kind.role

    @property
    def open(self) -> bool:
        return self.taking and self.used_credits < self.num_credits


Rank = tuple[float, float, str, Worker]
"""Load, what decides between equals, name, worker."""


@dataclass(slots=True, eq=False)
class Lane:
    """Workers of one kind that have a credit left, the least loaded first.

    Load is counted in prompt tokens that wait (prefill lanes), in requests (decode lanes), or in seconds (local lanes).
    """

    kind: Kind
    ranks: list[Rank] = field(default_factory=list)


class Fleet:
    """Workers, the pairs that are up, and what their caches hold. Told of changes; reads no clock.

    `settle` brings the order up to date; between two calls any number of changes to one worker cost one move.
    """

    def __init__(self, max_cached_blocks: int = 1_000_000) -> None:
        self.workers: dict[str, Worker] = {}
        self.caches = CacheMap(max_cached_blocks)
        self.kinds: dict[KindKey, Kind] = {}
        self.output_tokens = Average(OUTPUT_TOKENS)
        self.prefill_lanes: dict[Kind, Lane] = {}
        self.decode_lanes: dict[Kind, Lane] = {}
        self.local_lanes: dict[Kind, Lane] = {}
        self.prefill_names: list[str] = []
        self.decode_names: list[str] = []
        """Who can do which half, in order of their names."""
        self.prefill_bits = 0
        self.decode_bits = 0
        """The same of those that take work and tell of their caches, as `caches` has it."""
        self.version = 0
        """Another number whenever other routes exist."""
        self._downstream: dict[str, dict[str, int]] = {}  # epochs, by prefill and decode worker
        self._upstream: dict[str, dict[str, int]] = {}  # the same, by decode and prefill worker
        self._num_pairs: Counter[tuple[Kind, Kind]] = Counter()  # between workers that take work
        self._moved: set[str] = set()
        self._longest: dict[Disaggregation, tuple[int, int]] = {}  # each with the version that it is of

    # ---- what changes

    def add(self, incarnation: str, key: KindKey, num_credits: int, num_blocks: int) -> None:
        kind = self.kinds.get(key)
        if kind is None:
            alone = key.role is WorkerRole.MIXED or (key.runs_alone and key.role is WorkerRole.DECODE)
            kind = self.kinds[key] = Kind(key, key.role, key.cache[1], key.max_model_len, alone)
        kind.num_taking += 1
        self.workers[incarnation] = Worker(incarnation, kind, num_credits, reported_free_blocks=num_blocks)
        for names in self._names_of(key.role):
            bisect.insort(names, incarnation)
        self._moved.add(incarnation)
        self.version += 1

    def remove(self, incarnation: str) -> None:
        worker = self.workers.get(incarnation)
        if worker is None:
            return
        self.take_no_work(incarnation)
        for other in [*self._downstream.pop(incarnation, ())]:
            del self._upstream[other][incarnation]
        for other in [*self._upstream.pop(incarnation, ())]:
            del self._downstream[other][incarnation]
        leave(worker)
        for names in self._names_of(worker.role):
            del names[bisect.bisect_left(names, incarnation)]
        del self.workers[incarnation]
        self._moved.discard(incarnation)
        self.caches.forget(incarnation)
        self.version += 1

    def report(self, incarnation: str, *, num_free_blocks: int, num_active: int, num_waiting_tokens: int) -> None:
        """What a worker says of itself."""
        worker = self.workers[incarnation]
        worker.reported_free_blocks, worker.reported_active = num_free_blocks, num_active
        worker.reported_waiting_tokens = num_waiting_tokens
        self._moved.add(incarnation)

    def book(self, incarnation: str, *, used_credits: int, pending_tokens: int, pending_blocks: int) -> None:
        """What was asked of a worker and does not show in its reports yet; nothing where it is gone."""
        worker = self.workers.get(incarnation)
        if worker is not None:
            worker.used_credits, worker.pending_tokens = used_credits, pending_tokens
            worker.pending_blocks = pending_blocks
            self._moved.add(incarnation)

    def tell(self, incarnation: str, event: CacheChanged) -> None:
        """What a worker says of its cache."""
        worker = self.workers[incarnation]
        if event.cleared:
            self._mark(worker, 0)
        self.caches.apply(incarnation, event)
        self._mark(worker, self.caches.bit(incarnation) if worker.taking else 0)

    def take_no_work(self, incarnation: str) -> None:
        """The worker drains: it is in no route any more."""
        worker = self.workers[incarnation]
        if worker.taking:
            self._count(worker, -1)
            worker.taking = False
            self._mark(worker, 0)
            worker.kind.num_taking -= 1
            self._moved.add(incarnation)
            self.version += 1

    def pair_up(self, prefill: str, decode: str, epoch: int) -> None:
        p, d = self.workers[prefill], self.workers[decode]
        downstream = self._downstream.setdefault(prefill, {})
        if decode not in downstream and p.taking and d.taking:
            self._num_pairs[p.kind, d.kind] += 1
        downstream[decode] = epoch
        self._upstream.setdefault(decode, {})[prefill] = epoch
        self.version += 1

    def pair_down(self, prefill: str, decode: str) -> None:
        if self._downstream.get(prefill, {}).pop(decode, None) is None:
            return
        del self._upstream[decode][prefill]
        p, d = self.workers[prefill], self.workers[decode]
        if p.taking and d.taking:
            self._num_pairs[p.kind, d.kind] -= 1
        self.version += 1

    def _count(self, worker: Worker, change: int) -> None:
        """The worker's pairs come to, or go from, those between workers that take work."""
        for other in self._downstream.get(worker.incarnation, ()):
            if self.workers[other].taking:
                self._num_pairs[worker.kind, self.workers[other].kind] += change
        for other in self._upstream.get(worker.incarnation, ()):
            if self.workers[other].taking:
                self._num_pairs[self.workers[other].kind, worker.kind] += change

    def _mark(self, worker: Worker, bit: int) -> None:
        """The worker's bit, in the halves that it does."""
        if worker.bit != bit:
            if worker.role is not WorkerRole.DECODE:
                self.prefill_bits ^= worker.bit ^ bit
            if worker.role is not WorkerRole.PREFILL:
                self.decode_bits ^= worker.bit ^ bit
            worker.bit = bit

    def _names_of(self, role: WorkerRole) -> list[list[str]]:
        halves = (self.prefill_names, WorkerRole.DECODE), (self.decode_names, WorkerRole.PREFILL)
        return [names for names, other in halves if role is not other]

    # ---- order

    def settle(self) -> None:
        """Every worker stands where its load puts it."""
        for incarnation in self._moved:
            self._settle(self.workers[incarnation])
        self._moved.clear()

    def _settle(self, worker: Worker) -> None:
        free = worker.num_free_blocks = worker.reported_free_blocks - worker.pending_blocks
        used, active = worker.used_credits, worker.reported_active
        worker.num_active = active = max(active, used)
        waiting, pending = worker.reported_waiting_tokens, worker.pending_tokens
        worker.num_waiting_tokens = waiting = max(waiting, pending)
        if worker.places:
            leave(worker)
        if used >= worker.num_credits or not worker.taking:
            return
        role, kind = worker.kind.role, worker.kind
        if role is not WorkerRole.DECODE:
            enter(self.prefill_lanes, worker, waiting, active)
        if role is not WorkerRole.PREFILL:
            enter(self.decode_lanes, worker, active, -free)
        if kind.alone:
            seconds = waiting * kind.prefill.slope + active * kind.step.slope * self.output_tokens.value
            enter(self.local_lanes, worker, seconds, -free)

    # ---- routes

    def epoch(self, prefill: str, decode: str) -> int | None:
        """Of a pair that is up."""
        downstream = self._downstream.get(prefill)
        return downstream.get(decode) if downstream else None

    @property
    def cache_kinds(self) -> set[CacheKind]:
        return {kind.key.cache for kind in self.kinds.values() if kind.num_taking}

    def longest_route(self, mode: Disaggregation) -> int:
        """Most tokens that the two workers of some route can hold; 0 where there is no route that `mode` allows."""
        version, longest = self._longest.get(mode, (-1, 0))
        if version != self.version:
            pairs = (min(p.max_model_len, d.max_model_len) for (p, d), count in self._num_pairs.items() if count > 0)
            alone = (kind.max_model_len for kind in self.kinds.values() if kind.alone and kind.num_taking)
            longest = max((*(pairs if mode != "local" else ()), *(alone if mode != "require" else ())), default=0)
            self._longest[mode] = self.version, longest
        return longest

    def work_s(self, num_tokens: int, num_output: float) -> float:
        """Seconds of a worker's time that a request takes, on the fastest of each half."""
        kinds = [kind for kind in self.kinds.values() if kind.num_taking]
        read_s = [kind.prefill.at(num_tokens) for kind in kinds if kind.role is not WorkerRole.DECODE]
        token_s = [kind.step.at(USUAL_BATCH) / USUAL_BATCH for kind in kinds if kind.role is not WorkerRole.PREFILL]
        default_s = Line(*PREFILL_LINE).at(num_tokens)
        return min(read_s, default=default_s) + num_output * min(token_s, default=Line(*STEP_LINE).at(1))

    def routes(self, mode: Disaggregation = "prefer") -> Iterator[Route]:
        """Pairs that are up, and workers that can do both by themselves, save those that take no new work."""
        if mode != "local":
            yield from self._pairs()
        if mode != "require":
            yield from (
                Route(name, name) for name, worker in self.workers.items() if worker.kind.alone and worker.taking
            )

    def _pairs(self) -> Iterator[Route]:
        for prefill, downstream in self._downstream.items():
            if self.workers[prefill].taking:
                yield from (Route(prefill, d, epoch) for d, epoch in downstream.items() if self.workers[d].taking)


def enter(lanes: dict[Kind, Lane], worker: Worker, load: float, tie: float) -> None:
    """Take the place of that load."""
    lane = lanes.get(worker.kind)
    if lane is None:
        lane = lanes[worker.kind] = Lane(worker.kind)
        in_order = sorted(lanes.items(), key=lambda item: str(item[0].key))  # not in that in which workers came
        lanes.clear()
        lanes.update(in_order)
    rank = (load, tie, worker.incarnation, worker)
    bisect.insort(lane.ranks, rank)
    worker.places.append((lane, rank))


def leave(worker: Worker) -> None:
    """Give up every place."""
    for lane, rank in worker.places:
        ranks = lane.ranks
        del ranks[bisect.bisect_left(ranks, rank)]
    worker.places.clear()
