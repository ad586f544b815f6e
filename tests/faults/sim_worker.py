"""Workers of a simulation: the real ones, but for a model that is arithmetic, and channels and sessions that are lists.

Every value that a step finds in the cache is compared with what must stand there, every write of the network with who
owns those blocks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from cluster.session import RouterSession
from cluster.worker import EXPIRY_INTERVAL_S, FromRouter, SessionClosed, SessionOpened, Worker
from core.clock import Clock, ManualClock
from core.errors import TransferError
from core.messages import (
    Accepted,
    AttemptFailed,
    Cancel,
    Command,
    Connect,
    Event,
    Heartbeat,
    Load,
    Prefilled,
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
from kv_transfer.ownership import Holding, Ledger, SendState
from kv_transfer.plane import KVPlane
from kv_transfer.streaming import UNMEASURED, LinkFit
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
        self.garbage: list[str] = []
        """Requests that would have been decoded from it: a worker gets over a step that fails, a model must not."""

    def prepare(self, sampling: SamplingParams) -> None:
        """Nothing to compile."""

    def run(self, plan: Plan, on_layer: Callable[[int], None] | None = None) -> StepResult:
        for layer in range(LAYOUT.num_layers):
            for entry in plan.entries:
                before = list(self._scheduler.requests[entry.request_id].token_ids(0, entry.start))
                found = KVStorage.read(self._cache, layer, entry.block_ids, 0, entry.start)
                if not torch.equal(found, kv(layer, before, 0)):
                    self.garbage.append(entry.request_id)
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
    """What comes from outside is written for an attempt that owns the blocks and waits for it, or not at all."""

    arriving: AttemptKey | None = None
    owner: SimWorker

    def write(self, layer: int, block_ids: Sequence[int], start: int, end: int, *rest: Any, **options: Any) -> int:
        key, owner = self.arriving, self.owner
        assert key is not None
        assert tuple(owner.pool.table(engine_id(key)))[: len(block_ids)] == tuple(block_ids)
        assert key not in owner.cancelled, f"{key} is written after its cancel"
        assert owner.in_time(key), f"{key} is written after its lease"
        return super().write(layer, block_ids, start, end, *rest, **options)


@dataclass(eq=False)
class Link:
    """One epoch of a pair: segments queued by the sender, and those that are on their way, in any order."""

    epoch: int
    sender: SimWorker
    receiver: SimWorker
    closed: bool = False
    outbox: deque[Outgoing] = field(default_factory=deque)
    by_blocks: bool = True

    @property
    def fit(self) -> LinkFit:
        """Every other link is such that layers leave one by one, over the rest they leave together."""
        return LinkFit(1e-6, 1e6) if self.epoch % 2 else UNMEASURED

    def stage(self, num_bytes: int, wanted: Callable[[], bool]) -> Tensor | None:
        return torch.empty(num_bytes, dtype=torch.uint8) if wanted() and not self.closed else None

    def unstage(self, payload: Tensor) -> None:
        """Staging is as large as it is asked for."""

    def put(self, outgoing: Outgoing, wanted: Callable[[], bool], *, more: bool = False) -> bool:
        if self.closed or not wanted():
            return False
        assert outgoing.entry.key not in self.sender.cancelled, f"{outgoing.entry.key} is sent after its cancel"
        assert self.sender.in_time(outgoing.entry.key), f"{outgoing.entry.key} is sent after its lease"
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
    """Events wait in a list until the router hears them. `proof` looks at each when it is told."""

    def __init__(self, proof: Callable[[Event], None]) -> None:
        super().__init__(RouterHello("router", "router-1"))
        self.events: deque[Event] = deque()
        self._proof = proof

    def emit(self, event: Event) -> None:
        self._proof(event)
        self.events.append(event)

    def flush(self, load: Load) -> None:
        """They lie there already."""

    def close(self) -> None:
        """Nobody waits."""


class SimWorker:
    """One life of a worker. `commands` are on their way to it. Keeps books of its own of what the worker may hold."""

    def __init__(self, name: str, role: WorkerRole, incarnation: str, clock: ManualClock) -> None:
        self.name, self.role, self.incarnation, self._clock = name, role, incarnation, clock
        self.storage = GuardedStorage(LAYOUT, NUM_BLOCKS, torch.device("cpu"))
        self.storage.owner = self
        self.pool = BlockPool(NUM_BLOCKS, BLOCK_SIZE, PrefixIndex(LAYOUT.contents, BLOCK_SIZE))
        self.scheduler = Scheduler(
            self.pool, max_num_batched_tokens=BUDGET, max_num_seqs=MAX_SEQS, max_model_len=NUM_BLOCKS * BLOCK_SIZE
        )
        self.plane = SimPlane(incarnation, self.storage, clock, lambda event: self.worker.post(event))
        nothing = cast("Any", None)
        self._runner = Arithmetic(self.scheduler, self.storage)
        engine = Engine(
            nothing, LAYOUT, self.pool, self.scheduler, nothing, self._runner, self.storage, NUM_BLOCKS * BLOCK_SIZE
        )
        self.worker = Worker(engine, self.plane, role, incarnation, clock)
        self.cancelled: set[AttemptKey] = set()
        self._leases: dict[AttemptKey, float] = {}  # when each ends
        self._fenced: set[AttemptKey] = set()  # of a session that has ended
        self._latest: dict[str, int] = {}  # attempt that has held blocks here, by transfer id
        self.open_session()

    # ---- what comes to it

    def open_session(self) -> None:
        self.session, self.commands = SimSession(self._prove), deque[Command]()
        self.worker.post(SessionOpened(self.session))

    def break_session(self, *, noticed: bool) -> None:
        """All that is on its way is lost; a worker that does not notice has its leases alone."""
        if noticed:
            owners = self.worker._owners
            self._fenced.update(key for key in self._held() if owners[key] is self.session)
            self.worker.post(SessionClosed(self.session))
        self.open_session()

    def obey(self, command: Command) -> None:
        """A command arrives. Heartbeats and cancels are obeyed at once, the rest in the next turn."""
        self.worker.post(FromRouter(self.session, command))
        match command:
            case Heartbeat(live):
                for key in self._leases:
                    if key[0] in live and self.in_time(key):
                        self._leases[key] = self._clock() + LIMITS.lease_s
            case Cancel(ticket, _) if ticket.key in self._held():
                self.cancelled.add(ticket.key)
                for link in self.plane.links.links.values():
                    queued = [outgoing.entry.key for outgoing in link.outbox if link.sender is self]
                    assert ticket.key not in queued, f"{ticket.key} is still being sent after its cancel"

    def turn(self) -> None:
        """One turn of its loop."""
        over = {key for key, holding in self._holdings().items() if not holding.live} | self._fenced
        self.worker.turn(wait=False)
        self._fenced = set()
        assert not (left := over & self._held()), f"{left} are held after their end was told"
        held = self._held()
        self._leases = {key: ends_at for key, ends_at in self._leases.items() if key in held}
        for key in held:
            if key not in self._leases:
                self._leases[key] = self._clock() + LIMITS.lease_s
                assert key[1] > self._latest.get(key[0], 0), f"{key} is back"
                self._latest[key[0]] = key[1]
        if self._overdue():  # a step of it found out, and said so to the next turn
            self.worker.turn(wait=False)
        assert not (overdue := self._overdue()), f"{overdue} are held for nobody"

    # ---- what must hold

    def in_time(self, key: AttemptKey) -> bool:
        """Whether its lease, by our own books, has not run out. One that began in this very turn has none there yet."""
        return key not in self._leases or self._clock() < self._leases[key]

    def check(self) -> None:
        self.worker.check_integrity()
        assert not self._runner.garbage, f"{self._runner.garbage} decode garbage"
        held = self._held()
        assert len({transfer_id for transfer_id, _ in held}) == len(held), f"two attempts of one transfer: {held}"
        for key, holding in self._holdings().items():
            if holding.live and key in self._leases:
                assert holding.lease_expires_at <= self._leases[key], f"the lease of {key} is too long"

    def check_pair_is_down(self, link: Link) -> None:
        """Whatever was not carried to the end has failed."""
        for sending in self.plane.sender._sending.values():
            if sending.holding.ticket.pair_epoch == link.epoch and not sending.all_sent:
                assert not sending.holding.live, f"{sending.key} waits for a channel that is gone"
        for receiving in self.plane.receiver._receiving.values():
            ticket = receiving.holding.ticket
            assert ticket.pair_epoch != link.epoch or not receiving.waiting, f"{ticket.key} waits for what can't come"

    def assert_nothing_is_held(self) -> None:
        self.check()
        assert not self.scheduler.requests
        assert self.pool.num_free_blocks == NUM_BLOCKS

    def _held(self) -> set[AttemptKey]:
        return {(name.rpartition("/")[0], int(name.rpartition("/")[2])) for name in self.scheduler.requests}

    def _holdings(self) -> dict[AttemptKey, Holding[Any]]:
        plane = self.plane
        sides: list[Ledger[Any]] = [plane.sender._ledger, plane.receiver._ledger]
        return {holding.ticket.key: holding for ledger in sides for holding in ledger._holdings.values()}

    def _overdue(self) -> list[AttemptKey]:
        return [key for key in self._held() if self._clock() > self._leases[key] + EXPIRY_INTERVAL_S]

    def _prove(self, event: Event) -> None:
        """What is told is so."""
        match event:
            case Prefilled(key, _, _, record) if record is not None:
                assert self._holdings()[key].state is SendState.COMMITTED, f"{key} is told to be there, and is not"
            case AttemptFailed(key, reason, message):
                assert reason != "record_mismatch", f"{key}: {message}: nobody has lied"
            case Accepted(key, _):
                request = self.scheduler.requests[engine_id(key)]
                table, tokens = self.pool.table(engine_id(key)), request.prompt_token_ids
                for layer in range(LAYOUT.num_layers):
                    found = KVStorage.read(self.storage, layer, table, 0, len(tokens))
                    assert torch.equal(found, kv(layer, tokens, 0)), f"{key} was accepted, and is garbage"
