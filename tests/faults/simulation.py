"""A router, a prefill and two decode workers in one thread, on one clock, over a network that does what a test says.

Workers, halves, schedulers, pools, caches, senders and receivers are the real ones. The model is arithmetic, and
channels and sessions are lists. Every token that comes is compared with what must come, every value that a step finds
in the cache with what must stand there, every write of the network with who owns those blocks.
"""

from __future__ import annotations

import itertools
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
    Accept,
    Accepted,
    AttemptFailed,
    Cancel,
    Command,
    Connect,
    Event,
    Heartbeat,
    Load,
    Prefill,
    Prefilled,
    Refused,
    Release,
    Reserve,
    Reserved,
    RouterHello,
    StepTokens,
    Work,
    WorkerRole,
)
from core.request import FinishReason
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
from kv_transfer.frame import Entry
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


@dataclass(eq=False)
class Job:
    """A request as the router knows it. `stage` is of its attempt; None where it waits for one."""

    transfer_id: str
    prompt: tuple[int, ...]
    max_tokens: int
    streamed: list[int] = field(default_factory=list)
    attempt: int = 0
    ticket: Ticket | None = None
    stage: str | None = None
    workers: tuple[SimWorker, ...] = ()

    @property
    def work(self) -> Work:
        sampling = SamplingParams(max_tokens=self.max_tokens, temperature=0)
        return Work((*self.prompt, *self.streamed), len(self.prompt), sampling)

    def take(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            assert token == next_token([*self.prompt, *self.streamed]), f"{self.transfer_id} shows a gap or a repeat"
            self.streamed.append(token)


class Simulation:
    """The world: what the methods say happens, and nothing else does."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self._numbers = itertools.count(1)
        self.workers = {name: self._born(name) for name in ("p", "d0", "d1")}
        self.wire: list[tuple[Link, Outgoing]] = []
        self.jobs: dict[str, Job] = {}
        self.done: list[Job] = []
        self.said: list[tuple[str, Command]] = []
        self.links: dict[str, Link] = {}
        for name in ("d0", "d1"):
            self.connect(name)

    def _born(self, name: str) -> SimWorker:
        role = WorkerRole.PREFILL if name == "p" else WorkerRole.DECODE
        return SimWorker(name, role, f"{name}-{next(self._numbers)}", self.clock)

    # ---- the router

    def submit(self, prompt: tuple[int, ...], max_tokens: int) -> None:
        job = Job(f"t{next(self._numbers)}", prompt, max_tokens)
        self.jobs[job.transfer_id] = job

    def place(self, job: Job, name: str) -> None:
        """Begin an attempt, on the pair of the prefill worker and `name`."""
        prefill, decode, link = self.workers["p"], self.workers[name], self.links[name]
        if job.stage is not None or link.closed:
            return
        job.attempt += 1
        names = (prefill.incarnation, decode.incarnation)
        job.ticket = Ticket(f"request of {job.transfer_id}", job.attempt, job.transfer_id, *names, link.epoch)
        job.stage, job.workers = "reserving", (prefill, decode)
        self.say(decode, Reserve(job.ticket, job.work))

    def give_up(self, job: Job) -> None:
        """The attempt has failed, or takes too long: both workers are told, and it waits for another."""
        if job.ticket is not None and job.stage is not None:
            for worker in job.workers:
                self.say(worker, Cancel(job.ticket, "given up"))
        job.ticket, job.stage, job.workers = None, None, ()

    def cancel(self, job: Job) -> None:
        self.give_up(job)
        del self.jobs[job.transfer_id]

    def finish(self, job: Job) -> None:
        assert len(job.streamed) == job.max_tokens
        self.cancel(job)
        self.done.append(job)

    def say(self, worker: SimWorker, command: Command) -> None:
        if self.workers[worker.name] is worker:
            worker.commands.append(command)
            self.said.append((worker.name, command))

    def wanted(self, worker: SimWorker) -> list[AttemptKey]:
        return [job.ticket.key for job in self.jobs.values() if job.ticket is not None and worker in job.workers]

    def heartbeat(self, worker: SimWorker) -> None:
        self.say(worker, Heartbeat(tuple(transfer_id for transfer_id, _ in self.wanted(worker))))

    def hear(self, worker: SimWorker) -> None:
        """The next event of a worker; what is not of a current attempt, or not its turn, is dropped."""
        if not worker.session.events:
            return
        match event := worker.session.events.popleft():
            case StepTokens(sequences):
                for sequence in sequences:
                    if (job := self._current(sequence.key, "decoding")) is not None:
                        job.take(sequence.token_ids)
                        self._finish_if(job, sequence.finish)
            case Reserved(key, num_skipped):
                if job := self._current(key, "reserving"):
                    assert job.ticket is not None
                    job.stage = "prefilling"
                    self.say(job.workers[0], Prefill(job.ticket, job.work, num_skipped))
            case Prefilled():
                if job := self._current(event.key, "prefilling"):
                    self._on_prefilled(job, event)
            case Accepted(key, _):
                if job := self._current(key, "accepting"):
                    assert job.ticket is not None
                    job.stage = "decoding"
                    self.say(job.workers[0], Release(job.ticket))
            case AttemptFailed(key, _, _) | Refused(key, _):
                if job := self._current(key):
                    self.give_up(job)

    def _on_prefilled(self, job: Job, event: Prefilled) -> None:
        assert job.ticket is not None
        job.take([event.first_token_id])
        if event.finish is None:
            assert event.record is not None
            job.stage = "accepting"
            self.say(job.workers[1], Accept(job.ticket, event.record, event.first_token_id, 8.0))
        self._finish_if(job, event.finish)

    def _finish_if(self, job: Job, finish: FinishReason | None) -> None:
        if finish is not None:
            self.finish(job)

    def _current(self, key: AttemptKey, stage: str | None = None) -> Job | None:
        job = self.jobs.get(key[0])
        if job is None or job.ticket is None or job.ticket.key != key or stage not in (None, job.stage):
            return None
        return job

    # ---- the network

    def obey(self, worker: SimWorker) -> None:
        """The next command of the router comes to a worker."""
        if worker.commands:
            worker.obey(worker.commands.popleft())

    def leave(self, link: Link) -> None:
        """The next segment leaves its sender."""
        if link.outbox and not link.closed:
            outgoing = link.outbox.popleft()
            self.wire.append((link, outgoing))
            link.sender.plane.on_sent(outgoing.entry.key, outgoing.num_bytes, 0.0, self.clock())

    def arrive(self, which: int, fate: str) -> None:
        """A segment that is on its way comes (`late` ones come again), comes `damaged` or `short`, or is `lost`."""
        if not self.wire:
            return
        link, outgoing = self.wire[which % len(self.wire)]
        if fate != "again":
            del self.wire[which % len(self.wire)]
        payload = outgoing.payload.clone()
        if fate == "damaged":
            payload[which % payload.numel()] ^= 1 + which % 255
        elif fate == "short":
            payload = payload[: payload.numel() // 2]
        if fate != "lost":
            self._arrive(link.receiver, outgoing.entry, payload)

    def _arrive(self, receiver: SimWorker, entry: Entry, payload: Tensor) -> None:
        receiver.storage.arriving = entry.key
        receiver.plane.on_segment(entry, payload)
        receiver.storage.arriving = None

    def connect(self, name: str) -> None:
        """A new epoch of the pair of the prefill worker and `name`."""
        prefill, decode = self.workers["p"], self.workers[name]
        if (old := self.links.get(name)) is not None:
            self.cut(old)
        link = Link(next(self._numbers), prefill, decode)
        self.links[name] = link
        for worker in (prefill, decode):
            worker.plane.links.links[prefill.incarnation, decode.incarnation] = link

    def cut(self, link: Link) -> None:
        """The channel breaks; what has left may still come."""
        if link.closed:
            return
        link.closed = True
        pair = (link.sender.incarnation, link.receiver.incarnation)
        for worker in (link.sender, link.receiver):
            worker.plane.on_pair_down(pair, link.epoch, "cut")
        for job in list(self.jobs.values()):
            if job.workers == (link.sender, link.receiver) and job.stage != "decoding":
                self.give_up(job)

    # ---- faults

    def restart(self, name: str) -> None:
        """A worker is killed and comes back; whoever it worked for is told."""
        old = self.workers[name]
        self.workers[name] = self._born(name)
        for job in list(self.jobs.values()):
            if old in job.workers:
                self.give_up(job)
        for other in ("d0", "d1"):
            if name in ("p", other):
                self.connect(other)

    def lose_session(self, worker: SimWorker, *, noticed: bool) -> None:
        worker.break_session(noticed=noticed)
        for job in list(self.jobs.values()):
            if worker in job.workers:
                self.give_up(job)

    def restart_router(self, *, noticed: bool) -> None:
        """Nobody knows of any request any more."""
        self.jobs.clear()
        for worker in self.workers.values():
            worker.break_session(noticed=noticed)

    def replay(self, which: int) -> None:
        """A command that was said before comes once more, late."""
        if self.said:
            name, command = self.said[which % len(self.said)]
            if not isinstance(command, Heartbeat):
                self.workers[name].obey(command)

    # ---- time

    def run(self, spoiled: int = -1, fate: str = "whole") -> None:
        """All that is on its way comes, in order, and everybody takes a turn. One segment may have another fate."""
        for job in list(self.jobs.values()):
            self.place(job, "d0" if job.attempt % 2 == 0 else "d1")
        for worker in self.workers.values():
            while worker.commands:
                self.obey(worker)
            worker.turn(self.wanted(worker))
        for link in self.links.values():
            while link.outbox and not link.closed:
                self.leave(link)
        for place in range(len(self.wire)):
            self.arrive(0, fate if place == spoiled else "whole")
        for worker in self.workers.values():
            while worker.session.events:
                self.hear(worker)
