"""Which pairs of workers have a channel: a pure automaton for each, told the time.

```
          due                 both answered up
WAITING ──────▶ CONNECTING ───────────────────▶ UP
   ▲                │                           │
   └──── down, or no answer in time ◀───────────┘      down for good ──▶ BROKEN
```
A pair lives as long as the sessions of both its workers do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum

from core.messages import Connect, PairDown, PairUp, WorkerHello, WorkerRole
from router.config import SessionConfig


class PairState(Enum):
    WAITING = "waiting"
    CONNECTING = "connecting"
    UP = "up"
    BROKEN = "broken"


@dataclass(slots=True, eq=False)
class Pair:
    """`epoch` names the latest channel. `due_s` is when to connect (WAITING) or to give up waiting (CONNECTING)."""

    prefill: WorkerHello
    decode: WorkerHello
    due_s: float
    state: PairState = PairState.WAITING
    epoch: int = 0
    answered: set[str] = field(default_factory=set)
    reason: str = "not connected yet"
    num_failures: int = 0
    up_since_s: float = 0.0
    transport: str = ""

    @property
    def up(self) -> bool:
        return self.state is PairState.UP

    def connects(self) -> Iterator[tuple[str, Connect]]:
        """`(incarnation, command)` for each side."""
        for worker, peer in ((self.prefill, self.decode), (self.decode, self.prefill)):
            yield (
                worker.incarnation,
                Connect(
                    prefill_incarnation=self.prefill.incarnation,
                    decode_incarnation=self.decode.incarnation,
                    epoch=self.epoch,
                    store_address=self.decode.kv_address,
                    peer_layout=peer.layout,
                ),
            )


class PairTable:
    """All pairs. `next_epoch` gives a greater number at every call, and greater ones after a restart of the router."""

    def __init__(self, config: SessionConfig, next_epoch: Callable[[], int]) -> None:
        self._config = config
        self._next_epoch = next_epoch
        self._pairs: dict[tuple[str, str], Pair] = {}

    def __iter__(self) -> Iterator[Pair]:
        return iter(self._pairs.values())

    def add(self, hello: WorkerHello, others: Iterable[WorkerHello], now_s: float) -> None:
        """A worker has connected: pair it with every other, in each direction that their roles allow."""
        for other in others:
            for prefill, decode in ((hello, other), (other, hello)):
                if prefill.role is not WorkerRole.DECODE and decode.role is not WorkerRole.PREFILL:
                    self._pairs[prefill.incarnation, decode.incarnation] = Pair(prefill, decode, due_s=now_s)

    def remove(self, incarnation: str) -> None:
        """A session is gone, and with it the worker's pairs."""
        self._pairs = {names: pair for names, pair in self._pairs.items() if incarnation not in names}

    def answer_up(self, sender: str, event: PairUp, now_s: float) -> None:
        pair = self._current(event)
        if pair is None or pair.state is not PairState.CONNECTING:
            return
        pair.answered.add(sender)
        if pair.answered >= {pair.prefill.incarnation, pair.decode.incarnation}:
            pair.state, pair.reason, pair.up_since_s = PairState.UP, "", now_s
            pair.transport = event.transport

    def answer_down(self, event: PairDown, now_s: float) -> bool:
        """Whether this took down the pair's latest channel; a word about an older one changes nothing."""
        pair = self._current(event)
        if pair is None or pair.state not in (PairState.CONNECTING, PairState.UP):
            return False
        self._fail(pair, event.reason, now_s)
        if event.permanent:
            pair.state = PairState.BROKEN
        return True

    def due(self, now_s: float) -> list[Pair]:
        """Pairs to connect now, each under a fresh epoch."""
        for pair in self:
            if pair.state is PairState.CONNECTING and pair.due_s <= now_s:
                missing = {pair.prefill.incarnation, pair.decode.incarnation} - pair.answered
                names = [h.worker_id for h in (pair.prefill, pair.decode) if h.incarnation in missing]
                self._fail(pair, f"no answer from {' and '.join(names)}", now_s)
        ready = [pair for pair in self if pair.state is PairState.WAITING and pair.due_s <= now_s]
        for pair in ready:
            pair.state = PairState.CONNECTING
            pair.epoch = self._next_epoch()
            pair.answered.clear()
            pair.due_s = now_s + self._config.pair_timeout_s
        return ready

    def next_due_s(self) -> float | None:
        timed = (PairState.WAITING, PairState.CONNECTING)
        return min((pair.due_s for pair in self if pair.state in timed), default=None)

    def _current(self, event: PairUp | PairDown) -> Pair | None:
        pair = self._pairs.get((event.prefill_incarnation, event.decode_incarnation))
        return pair if pair and pair.epoch == event.epoch else None

    def _fail(self, pair: Pair, reason: str, now_s: float) -> None:
        """Back to WAITING. A pair that had been up for long enough begins with the shortest wait again."""
        if pair.up and now_s - pair.up_since_s >= self._config.max_pair_backoff_s:
            pair.num_failures = 0
        wait_s = min(self._config.pair_backoff_s * 2**pair.num_failures, self._config.max_pair_backoff_s)
        pair.num_failures = min(pair.num_failures + 1, 32)
        pair.state, pair.reason, pair.due_s = PairState.WAITING, reason, now_s + wait_s
        pair.transport = ""
