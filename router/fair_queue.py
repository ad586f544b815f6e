"""Who goes next: tenants share by weight what the workers do; of one tenant the most urgent request goes first.

Start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996) over predicted cost: a tenant's clock advances by cost /
weight with each request of it that is served, the tenant whose clock is behind goes next, and one that had nothing to
ask for starts from the clock of those that had: idle time is not saved up.
"""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from operator import itemgetter

from router.ledger import Entry

MAX_IDLE_TENANTS = 4096
"""Clocks that are kept of tenants with nothing in the queue."""

Urgency = tuple[float, int]
"""When a request should be served, its priority counted in, and its place among equals; the least goes first."""


@dataclass(frozen=True, slots=True)
class Claim:
    """What an entry asks of the queue. `cost` is what serving it takes, in any one unit.

    `due_s` should hold when it is to be served and may lie anywhere: waiting makes all requests more urgent alike, so
    the order of two never changes, and whoever comes late enough comes after.
    """

    tenant: str
    cost: float
    due_s: float
    num_tokens: int = 0


@dataclass(slots=True, eq=False)
class Tenant:
    name: str
    clock: float
    waiting: list[tuple[Urgency, Entry]] = field(default_factory=list)
    cost: float = 0.0
    """Of all that waits."""


class FairQueue:
    """Entries that wait, each once. Those that come back after a failure or a refusal go before all others, the oldest
    first: they have been paid for. Those that are stranded wait aside, until somebody could take them at all.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        """A tenant that is not named has weight 1."""
        self._weights = weights
        self._claims: dict[Entry, Claim] = {}
        self._tenants: dict[str, Tenant] = {}  # that have something to be served
        self._order: list[tuple[float, str]] = []  # their clocks and names
        self._idle: OrderedDict[str, float] = OrderedDict()  # clocks of others, those ahead of the common one
        self._returned: list[tuple[int, Entry]] = []
        self._stranded: dict[Entry, None] = {}
        self._paid: set[Entry] = set()
        self._clock = 0.0
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._claims)

    def __iter__(self) -> Iterator[Entry]:
        """In no order, over a copy."""
        return iter(tuple(self._claims))

    def __contains__(self, entry: Entry) -> bool:
        return entry in self._claims

    @property
    def stranded(self) -> tuple[Entry, ...]:
        return tuple(self._stranded)

    def first_stranded(self) -> Entry | None:
        return next(iter(self._stranded), None)

    def push(self, entry: Entry, claim: Claim) -> None:
        """Once served, an entry that comes again has been paid for."""
        self._claims[entry] = claim
        self.num_tokens += claim.num_tokens
        self._enter(entry)

    def first(self) -> Entry | None:
        """Who is to be served next."""
        if self._returned:
            return self._returned[0][1]
        return self._tenants[self._order[0][1]].waiting[0][1] if self._order else None

    def serve(self, entry: Entry) -> float:
        """Take it out; its tenant pays. Returns its cost, 0 where it had been paid for."""
        claim, cost = self._claims[entry], 0.0
        if entry not in self._paid:
            self._paid.add(entry)
            cost, tenant = claim.cost, self._tenants[claim.tenant]
            self._clock = max(self._clock, tenant.clock)
            self._advance(tenant, cost / self._weights.get(claim.tenant, 1.0))
        self._take_out(entry)
        return cost

    def remove(self, entry: Entry) -> bool:
        """Take it out for good; False where it is not in the queue."""
        self._paid.discard(entry)
        if entry not in self._claims:
            return False
        self._take_out(entry)
        return True

    def strand(self, entry: Entry) -> None:
        """Nobody could take it, whatever room there was: let others pass."""
        self._leave(entry)
        self._stranded[entry] = None

    def rescue(self, entry: Entry) -> None:
        """Somebody may take a stranded entry now."""
        del self._stranded[entry]
        self._enter(entry)

    # ---- what is ahead

    def num_of(self, tenant: str) -> int:
        """Entries of one tenant, without those that came back or are stranded."""
        known = self._tenants.get(tenant)
        return len(known.waiting) if known else 0

    @property
    def num_tenants(self) -> int:
        return len(self._tenants)

    def cost_ahead(self, claim: Claim) -> float:
        """What will be served before a request that would come now, others of their share at most."""
        ahead = sum(self._claims[entry].cost for _, entry in self._returned)
        mine = self._tenants.get(claim.tenant)
        weight = self._weights.get(claim.tenant, 1.0)
        own, clock = 0.0, max(self._idle.get(claim.tenant, 0.0), self._clock)
        if mine is not None:
            end = bisect.bisect_right(mine.waiting, claim.due_s, key=lambda each: each[0][0])
            own = mine.cost if end == len(mine.waiting) else sum(self._claims[e].cost for _, e in mine.waiting[:end])
            clock = mine.clock
        served_at = clock + own / weight
        for other in self._tenants.values():
            if other is not mine:
                share = (served_at - other.clock) * self._weights.get(other.name, 1.0)
                ahead += min(other.cost, max(0.0, share))
        return ahead + own

    # ---- places

    def _enter(self, entry: Entry) -> None:
        claim = self._claims[entry]
        if entry in self._paid:
            bisect.insort(self._returned, (entry.seq, entry), key=itemgetter(0))
            return
        tenant = self._tenants.get(claim.tenant)
        if tenant is None:
            clock = max(self._clock, self._idle.pop(claim.tenant, 0.0))
            tenant = self._tenants[claim.tenant] = Tenant(claim.tenant, clock)
            bisect.insort(self._order, (clock, claim.tenant))
        bisect.insort(tenant.waiting, ((claim.due_s, entry.seq), entry), key=itemgetter(0))
        tenant.cost += claim.cost

    def _leave(self, entry: Entry) -> None:
        """Out of its line, whichever that is."""
        claim = self._claims[entry]
        if entry in self._stranded:
            del self._stranded[entry]
            return
        line: list[tuple[int, Entry]] = self._returned
        index = bisect.bisect_left(line, entry.seq, key=itemgetter(0))
        if index < len(line) and line[index][1] is entry:
            del line[index]
            return
        tenant = self._tenants[claim.tenant]
        index = bisect.bisect_left(tenant.waiting, (claim.due_s, entry.seq), key=itemgetter(0))
        del tenant.waiting[index]
        tenant.cost -= claim.cost
        if not tenant.waiting:
            self._retire(tenant)

    def _take_out(self, entry: Entry) -> None:
        self._leave(entry)
        self.num_tokens -= self._claims.pop(entry).num_tokens

    def _advance(self, tenant: Tenant, by: float) -> None:
        del self._order[bisect.bisect_left(self._order, (tenant.clock, tenant.name))]
        tenant.clock += by
        bisect.insort(self._order, (tenant.clock, tenant.name))

    def _retire(self, tenant: Tenant) -> None:
        """Nothing of the tenant waits: its clock is kept while it is ahead."""
        del self._tenants[tenant.name]
        del self._order[bisect.bisect_left(self._order, (tenant.clock, tenant.name))]
        if tenant.clock > self._clock:
            self._idle[tenant.name] = tenant.clock
            if len(self._idle) > MAX_IDLE_TENANTS:
                self._idle.popitem(last=False)
