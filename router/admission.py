"""Who is let into the queue, and what those are told who are not."""

from __future__ import annotations

from collections import OrderedDict, deque

from core.errors import OverloadedError
from core.request import Request
from router.config import DispatchConfig
from router.fair_queue import Claim, FairQueue
from router.policies.fleet import Fleet
from router.policies.search import soonest_s

TENANT_MEMORY_S = 60.0
"""How long a tenant that asked for something counts as one that may want room in the queue."""
MAX_TENANTS = 1024
PATIENCE_S = 30.0
"""By when a request is due that says nothing itself."""
SHARE = 2.0
"""Places that a tenant may hold for each that is left, while others want some: two thirds of the queue at most."""


class RetryAdvice:
    """When to come back to a full queue: at the rate at which requests have ended lately, behind those told before.

    Everyone who is turned away is given the next place in an imagined line, which moves by one with each end.
    """

    def __init__(self, *, window: int = 256, unknown_s: float = 5.0, min_s: float = 0.1, max_s: float = 60.0) -> None:
        self._ends_s: deque[float] = deque(maxlen=window)  # of the last `max_s` seconds
        self._unknown_s, self._min_s, self._max_s = unknown_s, min_s, max_s
        self._line = 0

    def on_end(self, now_s: float) -> None:
        self._ends_s.append(now_s)
        self._line = max(0, self._line - 1)

    def retry_after_s(self, now_s: float) -> float:
        """For one more who is turned away now."""
        self._line += 1
        while self._ends_s and self._ends_s[0] < now_s - self._max_s:
            self._ends_s.popleft()
        if not self._ends_s:
            return self._unknown_s
        seconds_per_end = (now_s - self._ends_s[0]) / len(self._ends_s)
        return min(self._max_s, max(self._min_s, self._line * seconds_per_end))


class DrainRate:
    """How fast the queue empties: the cost that was served a second, lately, while there was a queue."""

    def __init__(self, *, window: int = 256, min_served: int = 4) -> None:
        self._served: deque[tuple[float, float]] = deque(maxlen=window)
        self._since_s: float | None = None  # there is a queue; the window begins here or later
        self._min_served = min_served
        self._last: float | None = None

    def on_served(self, cost: float, now_s: float) -> None:
        if self._since_s is None:
            return
        if len(self._served) == self._served.maxlen:
            self._since_s = self._served[0][0]
        self._served.append((now_s, cost))

    def on_length(self, length: int, now_s: float) -> None:
        """Requests wait, or none does any more: an empty queue tells nothing of what could have been served."""
        if length and self._since_s is None:
            self._since_s = now_s
        elif not length and self._since_s is not None:
            self._last = self.rate(now_s)
            self._since_s = None
            self._served.clear()

    def rate(self, now_s: float) -> float | None:
        """Cost a second; None where too little was seen."""
        if self._since_s is None or len(self._served) < self._min_served or now_s <= self._since_s:
            return self._last
        return sum(cost for _, cost in self._served) / (now_s - self._since_s)


class Door:
    """Refuses at once what would find no room, or come too late; each refusal is an `OverloadedError`.

    The queue holds `max_queue_len` requests and `max_queued_tokens` tokens. While several tenants ask, none can take
    all of it: a place is left for whoever comes next, so that fairness begins at the door.
    """

    def __init__(
        self,
        config: DispatchConfig,
        queue: FairQueue,
        advice: RetryAdvice,
        fleet: Fleet,
        slo_ttft_s: float | None = None,
    ) -> None:
        self._config = config
        self._queue = queue
        self._advice = advice
        self._fleet = fleet
        self._slo_ttft_s = slo_ttft_s
        self.drain = DrainRate()
        self._asked: OrderedDict[str, float] = OrderedDict()  # when each tenant asked last

    def claim(self, request: Request, timeout_s: float | None, now_s: float) -> Claim:
        """A request is due when its target or its timeout says so; priority moves that by the time it counts as.

        Its tenant is its API key's, or where there are no keys the user that it names.
        """
        num_output = min(self._fleet.output_tokens.value, request.sampling.max_tokens)
        patience_s = min(limit for limit in (PATIENCE_S, timeout_s, self._slo_ttft_s) if limit is not None)
        return Claim(
            tenant=request.tenant or request.user,
            cost=self._fleet.work_s(request.num_tokens, num_output),
            due_s=now_s + patience_s + request.priority * self._config.priority_aging_s,
            num_tokens=request.num_tokens,
        )

    def check(self, request: Request, timeout_s: float | None, now_s: float) -> None:
        """Whether to let it in, by the queue as it stands."""
        claim, slo_s = self.claim(request, timeout_s, now_s), self._slo_ttft_s
        self.check_room(claim, now_s)
        if slo_s is not None and self._fleet.longest_route(request.disaggregate):
            self.check_slo(claim, soonest_s(request.num_tokens, self._fleet), slo_s, now_s)

    def check_room(self, claim: Claim, now_s: float) -> None:
        queue, config = self._queue, self._config
        self._note(claim.tenant, now_s)
        length, own = len(queue), queue.num_of(claim.tenant)
        if length >= config.max_queue_len:
            self._refuse(f"the queue is full: {length} requests wait", 0.0, now_s)
        if length and queue.num_tokens + claim.num_tokens > config.max_queued_tokens:
            self._refuse(f"the queue is full: {queue.num_tokens} tokens wait", 0.0, now_s)
        if len(self._asked) > 1 and own >= SHARE * (config.max_queue_len - length):
            self._refuse(f"this tenant's share of the queue is full: {own} requests wait", 0.0, now_s)

    def check_slo(self, claim: Claim, service_s: float, slo_s: float, now_s: float) -> None:
        """`service_s`: from placement to the first token. Where nothing is known of the queue's pace, it is let in."""
        ahead, rate = self._queue.cost_ahead(claim), self.drain.rate(now_s)
        wait_s = (ahead + claim.cost) / rate if rate and len(self._queue) else 0.0
        late_s = wait_s + service_s - slo_s
        if late_s > 0:
            message = f"the first token would come after about {wait_s + service_s:.2g} s, {slo_s:g} s are promised"
            self._refuse(message, late_s, now_s)

    def _refuse(self, message: str, late_s: float, now_s: float) -> None:
        raise OverloadedError(message, max(late_s, self._advice.retry_after_s(now_s)))

    def _note(self, tenant: str, now_s: float) -> None:
        self._asked[tenant] = now_s
        self._asked.move_to_end(tenant)
        while len(self._asked) > MAX_TENANTS or next(iter(self._asked.values())) < now_s - TENANT_MEMORY_S:
            self._asked.popitem(last=False)
