"""Workers of a simulation: the real ones, but for a model that is arithmetic, and channels and sessions that are lists.

Every value that a step finds in the cache is compared with what must stand there, every write of the network with who
owns those blocks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from cluster.session import RouterSession
from cluster.worker import EXPIRY_INTERVAL_S, FromRouter, SessionClosed, SessionOpened, Worker
from core.clock import Clock, ManualClock
from core.errors import TransferError
from core.messages import (
    Command,
    Connect,
    Event,
    Heartbeat,
    Load,
    RouterHello,
    WorkerRole,
)
from core.sampling import SamplingParams
from core.ticket import AttemptKey, Ticket, engine_id
from engine.block_pool import BlockPool
from engine.engine import Engine
from engine.kv_storage import KVStorage
from engine.plan import Drawn, Plan, StepResult
from engine.prefix_index import PrefixIndex
from engine.runner import Runner
from engine.scheduler import Scheduler
from kv_transfer.config import TransferConfig
from kv_transfer.outbox import Outgoing
from kv_transfer.plane import KVPlane
from kv_transfer.transport import Transport
from tests.halves import BLOCK_SIZE, LAYOUT, kv

LIMITS = TransferConfig(lease_s=5, progress_timeout_s=10, queue_timeout_s=30)
NUM_BLOCKS, BUDGET, MAX_SEQS = 12, 8, 3


def next_token(tokens: Sequence[int]) -> int:
    """What the model writes behind `tokens`: all of them matter."""
    value = len(tokens)
    for token in tokens:
        value = (value * 31 + token) % 9973
    return 10 + value % 900


class Arithmetic(Runner):
    """Writes what `kv` says and draws `next_token`. What a step finds in the cache must be what was to be there."""

    mask_wait_s = 0.0

    def __init__(self, scheduler: Scheduler, storage: KVStorage) -> None:
        self._scheduler, self._cache = scheduler, storage

    def prepare(self, sampling: SamplingParams) -> None:
        """Nothing to compile."""

    def run(self, plan: Plan, on_layer: Callable[[int], None] | None = None) -> StepResult:
        for layer in range(LAYOUT.num_layers):
            for entry in plan.entries:
                before = list(self._scheduler.requests[entry.request_id].token_ids(0, entry.start))
                found = KVStorage.read(self._cache, layer, entry.block_ids, 0, entry.start)
                assert torch.equal(found, kv(layer, before, 0)), f"{entry.request_id} decodes garbage"
                values = kv(layer, entry.token_ids, entry.start)
                KVStorage.write(self._cache, layer, entry.block_ids, entry.start, entry.end, values)
            if on_layer is not None:
                on_layer(layer)
        drawn = {}
        for entry in plan.entries:
            if entry.sampling:
                before = list(self._scheduler.requests[entry.request_id].token_ids(0, entry.start))
                drawn[entry.request_id] = Drawn((next_token([*before, *entry.token_ids]),))
        return StepResult(drawn)


class GuardedStorage(KVStorage):
    """What comes from outside is written for the attempt that owns the blocks, or not at all."""

    arriving: AttemptKey | None = None
    pool: BlockPool

    def write(self, layer: int, block_ids: Sequence[int], start: int, end: int, *rest: Any, **options: Any) -> int:
        assert self.arriving is not None
        assert tuple(self.pool.table(engine_id(self.arriving)))[: len(block_ids)] == tuple(block_ids)
        return super().write(layer, block_ids, start, end, *rest, **options)


@dataclass(eq=False)
class Link:
    """One epoch of a pair: segments queued by the sender, and those that are on their way, in any order."""

    epoch: int
    sender: SimWorker
    receiver: SimWorker
    closed: bool = False
    outbox: deque[Outgoing] = field(default_factory=deque)

    def stage(self, num_bytes: int, wanted: Callable[[], bool]) -> Tensor | None:
        return torch.empty(num_bytes, dtype=torch.uint8) if wanted() and not self.closed else None

    def unstage(self, payload: Tensor) -> None:
        """Staging is as large as it is asked for."""

    def put(self, outgoing: Outgoing, wanted: Callable[[], bool]) -> bool:
        if self.closed or not wanted():
            return False
        self.outbox.append(outgoing)
        return True

    def drop(self, key: AttemptKey) -> None:
        self.outbox = deque(outgoing for outgoing in self.outbox if outgoing.entry.key != key)


class SimPairs:
    """Links of one worker, by (prefill, decode) incarnation."""

    def __init__(self) -> None:
        self.links: dict[tuple[str, str], Link] = {}

    def sending(self, ticket: Ticket) -> Link:
        link = self.links.get((ticket.prefill_incarnation, ticket.decode_incarnation))
        if link is None or link.closed or link.epoch != ticket.pair_epoch:
            raise TransferError("pair_down", "no such channel")
        return link

    def check_receiving(self, ticket: Ticket) -> None:
        self.sending(ticket)


class Nowhere:
    """No address: links are made by hand."""

    address = ""

    def meet(self, connect: Connect, rank: int) -> Transport:
        raise TransferError("pair_down", "nobody meets here")

    def close(self) -> None:
        """Nothing is open."""


class SimPlane(KVPlane):
    """The real sender and receiver over links that are lists."""

    def __init__(self, incarnation: str, storage: KVStorage, clock: Clock, notify: Callable[[Any], None]) -> None:
        super().__init__(incarnation, storage, "", LIMITS, clock, notify, Nowhere())
        self.links = SimPairs()
        self.sender._pairs = self.receiver._pairs = cast("Any", self.links)


class SimSession(RouterSession):
    """Events wait in a list until the router hears them."""

    def __init__(self) -> None:
        super().__init__(RouterHello("router", "router-1"))
        self.events: deque[Event] = deque()

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def flush(self, load: Load) -> None:
        """They lie there already."""

    def close(self) -> None:
        """Nobody waits."""


class SimWorker:
    """One life of a worker. `commands` are on their way to it."""

    def __init__(self, name: str, role: WorkerRole, incarnation: str, clock: ManualClock) -> None:
        self.name, self.role, self.incarnation, self._clock = name, role, incarnation, clock
        self.storage = GuardedStorage(LAYOUT, NUM_BLOCKS, torch.device("cpu"))
        self.pool = self.storage.pool = BlockPool(NUM_BLOCKS, BLOCK_SIZE, PrefixIndex(LAYOUT.contents, BLOCK_SIZE))
        self.scheduler = Scheduler(
            self.pool, max_num_batched_tokens=BUDGET, max_num_seqs=MAX_SEQS, max_model_len=NUM_BLOCKS * BLOCK_SIZE
        )
        self.plane = SimPlane(incarnation, self.storage, clock, lambda event: self.worker.post(event))
        runner, nothing = Arithmetic(self.scheduler, self.storage), cast("Any", None)
        engine = Engine(
            nothing, LAYOUT, self.pool, self.scheduler, nothing, runner, self.storage, NUM_BLOCKS * BLOCK_SIZE
        )
        self.worker = Worker(engine, self.plane, role, incarnation, clock)
        self.renewed: dict[str, float] = {}
        self.latest: dict[str, int] = {}  # attempt that has held blocks here, by transfer id
        self.open_session()

    def open_session(self) -> None:
        self.session, self.commands = SimSession(), deque[Command]()
        self.worker.post(SessionOpened(self.session))

    def break_session(self, *, noticed: bool) -> None:
        """All that is on its way is lost; a worker that does not notice has its leases alone."""
        if noticed:
            self.worker.post(SessionClosed(self.session))
        self.open_session()

    def obey(self, command: Command) -> None:
        if isinstance(command, Heartbeat):
            self.renewed.update(dict.fromkeys(command.live_transfer_ids, self._clock()))
        self.worker.post(FromRouter(self.session, command))

    def turn(self, wanted: Iterable[AttemptKey]) -> None:
        """One turn of its loop; what nobody has wanted for a lease must be gone then, and so must older attempts."""
        self.worker.turn(wait=False)
        for transfer_id, attempt in (name.split("/") for name in self.scheduler.requests):
            assert int(attempt) >= self.latest.get(transfer_id, 0), f"{transfer_id}/{attempt} is back"
            if int(attempt) > self.latest.get(transfer_id, 0):  # however long ago it was asked for
                self.latest[transfer_id], self.renewed[transfer_id] = int(attempt), self._clock()
        current = {engine_id(key) for key in wanted}
        if self._overdue(current):  # a step of it found out, and said so to the next turn
            self.worker.turn(wait=False)
        assert not (overdue := self._overdue(current)), f"{overdue} are held for nobody"

    def _overdue(self, current: set[str]) -> list[str]:
        ends_at = {name: self.renewed[name.rpartition("/")[0]] + LIMITS.lease_s for name in self.scheduler.requests}
        return [name for name in ends_at if name not in current and self._clock() > ends_at[name] + EXPIRY_INTERVAL_S]

    def check(self) -> None:
        self.worker.check_integrity()

    def assert_nothing_is_held(self) -> None:
        self.check()
        assert not self.scheduler.requests
        assert self.pool.num_free_blocks == NUM_BLOCKS
