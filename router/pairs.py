"""Which pairs of workers have a channel: a pure automaton for each, told the time.

```
     room, or wanted         due              both answered up
IDLE ──────────────▶ WAITING ───▶ CONNECTING ──────────────────▶ UP      down for good ──▶ BROKEN
 ▲ ▲                    ▲              │                         ││
 │ │                    └── down, or no answer in time ◀─────────┘│
 │ └──── another pair is wanted more, and nobody uses this one ◀──┤
 └── time is served ◀── QUARANTINED ◀── fails again and again ◀───┘
```
A channel costs each of its workers memory, so a worker has `max_pairs` at most. While there is room pairs are connected
ahead of need, first those whose workers have fewest; later on, a pair that is wanted takes the place of the one that
was not used for longest. A pair lives as long as the sessions of both its workers do.
"""

from __future__ import annotations

import heapq
import secrets
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum

from core.messages import Connect, Disconnect, PairDown, PairUp, WorkerHello, WorkerRole
from router.config import SessionConfig

PairKey = tuple[str, str]
"""Incarnations of the prefill and the decode worker."""
Told = tuple[str, Connect | Disconnect]
"""A command, and the incarnation that it goes to."""
SECRET_BYTES = 32
TRANSFER_FAULTS = frozenset(
    {
        "accept_timeout",
        "checksum_mismatch",
        "duplicate_segment",
        "progress_deadline",
        "record_mismatch",
        "staging_full",
        "unexpected_segment",
    }
)
"""Reasons of failed attempts that speak against the channel they came by."""


class PairState(Enum):
    IDLE = "idle"
    WAITING = "waiting"
    CONNECTING = "connecting"
    UP = "up"
    QUARANTINED = "quarantined"
    BROKEN = "broken"


_OPEN = (PairState.WAITING, PairState.CONNECTING, PairState.UP)
_TIMED = (PairState.WAITING, PairState.CONNECTING, PairState.QUARANTINED)


@dataclass(slots=True, eq=False)
class Pair:
    """`epoch` names the latest channel, `secret` is known to its two sides alone. `due_s` is when to connect (WAITING),
    to give up waiting (CONNECTING), or to be free (QUARANTINED). `num_failures` are channels that did not hold,
    `num_bad_transfers` attempts that failed on this one, each in a row.
    """

    prefill: WorkerHello
    decode: WorkerHello
    due_s: float
    state: PairState = PairState.IDLE
    epoch: int = 0
    answered: set[str] = field(default_factory=set)
    reason: str = "not connected yet"
    num_failures: int = 0
    num_bad_transfers: int = 0
    up_since_s: float = 0.0
    used_s: float = 0.0
    transport: str = ""
    secret: bytes = field(default=b"", repr=False)

    @property
    def key(self) -> PairKey:
        return self.prefill.incarnation, self.decode.incarnation

    @property
    def workers(self) -> tuple[WorkerHello, WorkerHello]:
        return self.prefill, self.decode

    @property
    def for_prompts(self) -> bool:
        """Else it is for what is handed over or copied."""
        return self.prefill.role is not WorkerRole.DECODE and self.decode.role is not WorkerRole.PREFILL

    @property
    def known(self) -> bool:
        """Whether users should hear of it: of one that nobody may ever need only when it is open."""
        return self.for_prompts or self.state in _OPEN

    @property
    def up(self) -> bool:
        return self.state is PairState.UP

    def connects(self) -> Iterator[tuple[str, Connect]]:
        for worker, peer in ((self.prefill, self.decode), (self.decode, self.prefill)):
            yield (
                worker.incarnation,
                Connect(
                    prefill_incarnation=self.prefill.incarnation,
                    decode_incarnation=self.decode.incarnation,
                    epoch=self.epoch,
                    store_address=self.decode.kv_address,
                    peer_layout=peer.layout,
                    secret=self.secret,
                ),
            )

    def disconnects(self) -> Iterator[tuple[str, Disconnect]]:
        for incarnation in self.key:
            yield incarnation, Disconnect(*self.key, self.epoch)


class PairTable:
    """All pairs. `next_epoch` gives a greater number at every call, and greater ones after a restart of the router."""

    def __init__(self, config: SessionConfig, next_epoch: Callable[[], int]) -> None:
        self._config = config
        self._next_epoch = next_epoch
        self._pairs: dict[PairKey, Pair] = {}
        self._room_changed = False
        self._changes: dict[PairKey, int | None] = {}

    def __iter__(self) -> Iterator[Pair]:
        return iter(self._pairs.values())

    def add(self, hello: WorkerHello, others: Iterable[WorkerHello], now_s: float) -> None:
        """A worker has connected: pair it with every other, in each direction that their roles allow.

        The other directions are for K and V that are there already: of what is handed over, or copied for a prompt.
        """
        for other in others:
            for prefill, decode in ((hello, other), (other, hello)):
                if not prefill.role is decode.role is WorkerRole.PREFILL:
                    self._pairs[prefill.incarnation, decode.incarnation] = Pair(prefill, decode, due_s=now_s)
        self._room_changed = True

    def remove(self, incarnation: str) -> None:
        """A session is gone, and with it the worker's pairs."""
        self._pairs = {names: pair for names, pair in self._pairs.items() if incarnation not in names}
        self._room_changed = True

    def is_idle(self, key: PairKey) -> bool:
        """Whether `want` could connect it."""
        pair = self._pairs.get(key)
        return pair is not None and pair.state is PairState.IDLE

    def has_room(self, key: PairKey) -> bool:
        """Whether `want` could connect it without another being closed."""
        num_open = self._num_open()
        return self.is_idle(key) and all(num_open[w.incarnation] < w.max_pairs for w in self._pairs[key].workers)

    @property
    def any_idle(self) -> bool:
        return any(pair.state is PairState.IDLE and pair.for_prompts for pair in self)

    def take_changes(self) -> dict[PairKey, int | None]:
        """Pairs that came up since the last call, with their epochs, and those that did not stay so, with None.

        Of those that are not for prompts nothing is told, nor of those that a worker took with it.
        """
        changes, self._changes = self._changes, {}
        return {key: epoch for key, epoch in changes.items() if key in self._pairs}

    # ---- what workers say

    def answer_up(self, sender: str, event: PairUp, now_s: float) -> None:
        pair = self._current(event)
        if pair is None or pair.state is not PairState.CONNECTING:
            return
        pair.answered.add(sender)
        if pair.answered >= {*pair.key}:
            pair.state, pair.reason, pair.up_since_s, pair.used_s = PairState.UP, "", now_s, now_s
            pair.transport, pair.num_bad_transfers = event.transport, 0
            if pair.for_prompts:
                self._changes[pair.key] = pair.epoch

    def answer_down(self, event: PairDown, now_s: float) -> bool:
        """Whether this took down the pair's latest channel; a word about an older one changes nothing."""
        pair = self._current(event)
        if pair is None or pair.state not in (PairState.CONNECTING, PairState.UP):
            return False
        self._fail(pair, event.reason, now_s)
        if event.permanent:
            pair.state, pair.reason = PairState.BROKEN, event.reason
        return True

    # ---- what requests do

    def touch(self, key: PairKey, now_s: float) -> None:
        """A request was placed on the pair."""
        if pair := self._pairs.get(key):
            pair.used_s = now_s

    def transfer_ended(self, key: PairKey, epoch: int, *, well: bool, now_s: float) -> list[Told]:
        """A transfer over the channel of `epoch` came to its end, or failed by one of TRANSFER_FAULTS.

        The pair that fails `pair_quarantine_after` of them in a row is closed for a while: what to tell its workers.
        It stays up where no other pair is, for then any chance is better than none.
        """
        pair = self._pairs.get(key)
        if pair is None or pair.epoch != epoch or not pair.up:
            return []
        pair.num_bad_transfers = 0 if well else pair.num_bad_transfers + 1
        others_up = any(other.up and other is not pair for other in self)
        if pair.num_bad_transfers < self._config.pair_quarantine_after or not others_up:
            return []
        reason = f"{pair.num_bad_transfers} transfers in a row have failed"
        self._close(pair, PairState.QUARANTINED, reason)
        pair.due_s = now_s + self._config.pair_quarantine_s
        return [*pair.disconnects()]

    def want(self, key: PairKey, in_use: Collection[PairKey], now_s: float) -> list[Told]:
        """An idle pair is wanted: it is due at once, in the place of unused ones where its workers have too many.

        What to tell the workers of those. Nothing changes where all are `in_use`, or a pair of the two is on its way.
        """
        pair = self._pairs.get(key)
        if pair is None or pair.state is not PairState.IDLE:
            return []
        num_open, evicted = self._num_open(), list[Pair]()
        for worker in pair.workers:
            mine = [other for other in self if worker.incarnation in other.key and other.state in _OPEN]
            if any(not other.up for other in mine):
                return []
            if num_open[worker.incarnation] >= worker.max_pairs:
                unused = [other for other in mine if other.key not in in_use]
                if not unused:
                    return []
                evicted.append(min(unused, key=lambda other: other.used_s))
        for other in evicted:
            self._close(other, PairState.IDLE, "closed, for another pair was wanted more")
        pair.state, pair.due_s = PairState.WAITING, now_s
        return [told for other in evicted for told in other.disconnects()]

    # ---- time

    def expire(self, now_s: float) -> list[Told]:
        """Give up waiting for answers: what to tell those workers, one of which may have a channel all the same."""
        told: list[Told] = []
        for pair in self:
            if pair.state is PairState.CONNECTING and pair.due_s <= now_s:
                missing = {*pair.key} - pair.answered
                names = [h.worker_id for h in pair.workers if h.incarnation in missing]
                self._fail(pair, f"no answer from {' and '.join(names)}", now_s)
                told += pair.disconnects()
        return told

    def due(self, now_s: float) -> list[Pair]:
        """Pairs to connect now, each under a fresh epoch."""
        for pair in self:
            if pair.state is PairState.QUARANTINED and pair.due_s <= now_s:
                pair.state, self._room_changed = PairState.IDLE, True
        self._use_room(now_s)
        ready = [pair for pair in self if pair.state is PairState.WAITING and pair.due_s <= now_s]
        for pair in ready:
            pair.state = PairState.CONNECTING
            pair.epoch, pair.secret = self._next_epoch(), secrets.token_bytes(SECRET_BYTES)
            pair.answered.clear()
            pair.due_s = now_s + self._config.pair_timeout_s
        return ready

    def next_due_s(self) -> float | None:
        return min((pair.due_s for pair in self if pair.state in _TIMED), default=None)

    def _use_room(self, now_s: float) -> None:
        """Connect ahead of need: the pair whose workers have fewest comes first, so that none is left alone."""
        if not self._room_changed:
            return
        self._room_changed = False
        num_open = self._num_open()

        def fullness(pair: Pair) -> int:
            return max(num_open[name] for name in pair.key)

        idle = [
            (fullness(pair), i, pair)
            for i, pair in enumerate(self)
            if pair.state is PairState.IDLE and pair.for_prompts
        ]
        heapq.heapify(idle)
        while idle:
            known, i, pair = heapq.heappop(idle)
            if any(num_open[worker.incarnation] >= worker.max_pairs for worker in pair.workers):
                continue
            if (now := fullness(pair)) > known:
                heapq.heappush(idle, (now, i, pair))
                continue
            pair.state, pair.due_s = PairState.WAITING, now_s
            num_open.update(pair.key)

    def _num_open(self) -> Counter[str]:
        """Places taken, by incarnation."""
        return Counter(name for pair in self if pair.state in _OPEN for name in pair.key)

    def _current(self, event: PairUp | PairDown) -> Pair | None:
        pair = self._pairs.get((event.prefill_incarnation, event.decode_incarnation))
        return pair if pair and pair.epoch == event.epoch else None

    def _fail(self, pair: Pair, reason: str, now_s: float) -> None:
        """Try again after a while. A pair that had been up for long enough begins with the shortest wait again.

        One that fails again and again gives its place to others meanwhile.
        """
        if pair.up and now_s - pair.up_since_s >= self._config.max_pair_backoff_s:
            pair.num_failures = 0
        wait_s = min(self._config.pair_backoff_s * 2**pair.num_failures, self._config.max_pair_backoff_s)
        pair.num_failures = min(pair.num_failures + 1, 32)
        again = pair.num_failures >= self._config.pair_quarantine_after
        self._close(pair, PairState.QUARANTINED if again else PairState.WAITING, reason)
        pair.due_s = now_s + wait_s

    def _close(self, pair: Pair, state: PairState, reason: str) -> None:
        if pair.up and pair.for_prompts:
            self._changes[pair.key] = None
        pair.state, pair.reason, pair.transport = state, reason, ""
        self._room_changed = True
