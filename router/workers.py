"""The workers the router knows: one record each, a session where it can be reached, and the pairs they form."""

from __future__ import annotations

import asyncio
import logging
import secrets
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Protocol

from core.clock import Clock
from core.messages import (
    CacheChanged,
    CacheFlushed,
    Command,
    Drain,
    Drained,
    Event,
    Load,
    PairDown,
    PairUp,
    RouterHello,
    WorkerHello,
    WorkerRole,
)
from core.request import Disaggregation
from core.ticket import LANE_BITS, Ticket
from router.access.network import WorkerNetwork
from router.config import SessionConfig
from router.epochs import wall_clock_epochs
from router.info import PairInfo, WorkerInfo
from router.pairs import PairKey, PairState, PairTable, Told
from router.policies.fleet import Fleet, KindKey
from router.policies.model import Route
from router.rpc import Registration, SessionLostError, WireError, WorkerMessage
from router.session import Session
from router.worker import Worker, describe

logger = logging.getLogger(__name__)


class WorkerListener(Protocol):
    """Who is told what happens. Called on the event loop; must not wait. Workers are named by incarnation."""

    def on_event(self, incarnation: str, event: Event) -> None:
        """An event about an attempt."""

    def on_lost(self, incarnation: str, reason: str) -> None:
        """The session is gone: whatever it carried is over."""

    def on_pair_down(self, prefill: str, decode: str, epoch: int, reason: str) -> None:
        """Transfers on that channel are over."""

    def on_change(self) -> None:
        """Loads, workers or pairs are not what they were: what had no room may have some now."""

    def live_transfer_ids(self, incarnation: str) -> tuple[str, ...]:
        """Transfers whose leases on that worker are to be renewed."""


class Workers:
    """Dials whoever registers, keeps one session to each, and keeps their pairs connected.

    With a `fingerprint`, workers that serve anything else are not connected.
    """

    def __init__(
        self,
        config: SessionConfig,
        *,
        router_id: str,
        clock: Clock,
        fingerprint: str | None = None,
        next_epoch: Callable[[], int] | None = None,
        fleet: Fleet | None = None,
        network: WorkerNetwork | None = None,
    ) -> None:
        """`fleet` is kept as placement wants to see it; `network` is how workers are dialled."""
        self._network = network
        self.fleet = fleet or Fleet()
        self._config = config
        self._clock = clock
        self._fingerprint = fingerprint
        self._hello = RouterHello(router_id, uuid.uuid4().hex)
        self._pairs = PairTable(config, next_epoch or wall_clock_epochs(lane=secrets.randbits(LANE_BITS)))
        self._by_id: dict[str, Worker] = {}
        self._connected: dict[str, Worker] = {}  # by incarnation
        self._alarm: asyncio.TimerHandle | None = None
        self._retired: set[asyncio.Task[None]] = set()
        self._listener: WorkerListener | None = None
        self._max_model_len: tuple[int, int | None] = (-1, None)  # with the version of the fleet it is of

    def subscribe(self, listener: WorkerListener) -> None:
        """Before the first registration; one listener."""
        self._listener = listener

    def register(self, registration: Registration) -> bool:
        """A worker is alive: dial it unless connected. Returns whether it is. A new incarnation replaces the old."""
        worker = self._by_id.get(registration.worker_id)
        if worker and worker.incarnation != registration.incarnation:
            self._retire(worker, "a new incarnation took its place")
            worker = None
        if worker is None:
            worker = self._by_id[registration.worker_id] = Worker(registration, self._clock())
            worker.task = asyncio.get_running_loop().create_task(self._keep_connected(worker))
        worker.registration, worker.registered_s = registration, self._clock()
        return worker.session is not None

    def __len__(self) -> int:
        """All that registered and are not forgotten."""
        return len(self._by_id)

    def knows(self, worker_id: str) -> bool:
        return worker_id in self._by_id

    def connected(self) -> Iterator[tuple[WorkerHello, Worker]]:
        for worker in self._connected.values():
            if worker.session:
                yield worker.session.hello, worker

    def hello(self, incarnation: str) -> WorkerHello:
        """Of a connected worker."""
        session = self._connected[incarnation].session
        assert session is not None
        return session.hello

    def name_of(self, incarnation: str) -> str:
        """Its worker's id; empty where the incarnation is not known any more."""
        return next((name for name, worker in self._by_id.items() if worker.incarnation == incarnation), "")

    def load(self, incarnation: str) -> Load | None:
        """What a worker last said of itself; None where it is not connected."""
        worker = self._connected.get(incarnation)
        return worker.load if worker else None

    @property
    def max_model_len(self) -> int | None:
        """Most tokens that some prefill and some decode worker can hold; None while there are none."""
        version, known = self._max_model_len
        if version != self.fleet.version:
            known = self._longest()
            self._max_model_len = self.fleet.version, known
        return known

    def _longest(self) -> int | None:
        hellos = [hello for hello, _ in self.connected()]
        prefill = max((hello.max_model_len for hello in hellos if hello.role is not WorkerRole.DECODE), default=None)
        decode = max((hello.max_model_len for hello in hellos if hello.role is not WorkerRole.PREFILL), default=None)
        return None if prefill is None or decode is None else min(prefill, decode)

    def routes(self) -> tuple[Route, ...]:
        """Pairs that are up and mixed workers by themselves, save those that take no new work."""
        return tuple(self.fleet.routes())

    @property
    def any_idle_pair(self) -> bool:
        """Whether some pair could be connected that is not, for nobody has needed it yet; `want` connects one."""
        return self._pairs.any_idle

    def is_idle(self, prefill: str, decode: str) -> bool:
        return self._pairs.is_idle((prefill, decode))

    def ways_out(self, incarnation: str, state: PairState) -> tuple[Route, ...]:
        """Pairs in that state by which the worker can send what it has in its cache."""
        pairs = (pair for pair in self._pairs if pair.prefill.incarnation == incarnation and pair.state is state)
        return tuple(Route(*pair.key, pair.epoch) for pair in pairs)

    def want(self, route: Route, in_use: Collection[PairKey]) -> None:
        """Connect an idle pair, in the background; pairs `in_use` do not make room for it."""
        self._tell(self._pairs.want((route.prefill, route.decode), in_use, self._clock()))
        self._connect_pairs()

    def has_room_for(self, prefill: str, decode: str) -> bool:
        """Whether the two could be connected, and no other pair need make room."""
        return self._pairs.has_room((prefill, decode))

    def touch(self, route: Route) -> None:
        """A request goes this way."""
        self._pairs.touch((route.prefill, route.decode), self._clock())

    def transfer_ended(self, ticket: Ticket, *, well: bool) -> None:
        """How a transfer ended, where that says something of its channel; see `PairTable.transfer_ended`."""
        key = (ticket.prefill_incarnation, ticket.decode_incarnation)
        self._tell(self._pairs.transfer_ended(key, ticket.pair_epoch, well=well, now_s=self._clock()))
        self._connect_pairs()

    def send(self, incarnation: str, *commands: Command) -> None:
        """Without effect where the session is gone: its listener has been told."""
        worker = self._connected.get(incarnation)
        if worker and worker.session:
            worker.session.send(*commands)

    def drain(self, worker_id: str, deadline_s: float) -> bool:
        """Give the worker no more work and tell it so; False where it is not connected."""
        worker = self._by_id.get(worker_id)
        if worker is None or worker.session is None:
            return False
        self._take_no_work(worker)
        worker.session.send(Drain(deadline_s))
        return True

    def flush_prefix_cache(self, worker_id: str) -> asyncio.Future[int] | None:
        """As `Worker.flush`; None as well where there is no such worker."""
        worker = self._by_id.get(worker_id)
        return worker.flush() if worker else None

    def problem(self, mode: Disaggregation) -> str:
        """Why no request of that mode can be served, in a clause; empty where one can."""
        if self.fleet.longest_route(mode):
            return ""
        reasons = [pair.reason for pair in self._pairs if pair.reason and pair.for_prompts]
        if reasons:
            return f"no pair of workers is up: {reasons[0]}"
        names = ", ".join(sorted(hello.worker_id for hello, _ in self.connected()))
        return f"of the workers it takes only {names} is connected" if names else "no worker is connected"

    def describe_workers(self, num_credits_used: Callable[[str], int]) -> tuple[WorkerInfo, ...]:
        return tuple(
            describe(worker, num_credits_used(worker.incarnation)) for _, worker in sorted(self._by_id.items())
        )

    def describe_pairs(self) -> tuple[PairInfo, ...]:
        return tuple(
            PairInfo(pair.prefill.worker_id, pair.decode.worker_id, pair.epoch, pair.up, pair.reason, pair.transport)
            for pair in self._pairs
            if pair.known
        )

    async def close(self) -> None:
        """End every session."""
        for worker in [*self._by_id.values()]:
            self._retire(worker, "the router is shutting down")
        self._by_id.clear()
        if self._alarm:
            self._alarm.cancel()
        await asyncio.gather(*self._retired, return_exceptions=True)

    # ---- one worker

    async def _keep_connected(self, worker: Worker) -> None:
        backoff_s = self._config.reconnect_backoff_s
        while True:
            try:
                session = await self._open(worker)
                backoff_s = self._config.reconnect_backoff_s
                await self._serve(worker, session)
            except (SessionLostError, WireError) as error:
                if worker.problem != error.message:  # said once, not at every dial
                    logger.warning("worker %s is not connected: %s", worker.registration.worker_id, error)
                self._on_lost(worker, error.message)
            except Exception:
                logger.exception("worker %s: the session failed", worker.registration.worker_id)
                self._on_lost(worker, "internal error of the router")
            if self._clock() - worker.registered_s > self._config.forget_after_s:
                del self._by_id[worker.registration.worker_id]
                return
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, self._config.max_reconnect_backoff_s)

    async def _serve(self, worker: Worker, session: Session) -> None:
        try:
            self._on_connected(worker, session)
            await session.run(
                lambda message: self._on_message(worker, message),
                lambda: self._told().live_transfer_ids(worker.incarnation),
            )
        finally:
            await session.close()

    async def _open(self, worker: Worker) -> Session:
        registration = worker.registration
        session = await Session.open(registration.address, self._hello, self._config, self._network)
        hello = session.hello
        problem = None
        if (hello.worker_id, hello.incarnation) != (registration.worker_id, registration.incarnation):
            problem = f"worker {hello.worker_id!r} ({hello.incarnation}) answers at {registration.address}"
        elif self._fingerprint not in (None, hello.layout.fingerprint):
            problem = f"it serves another model: {hello.layout.model} ({hello.layout.fingerprint})"
        if problem:
            await session.close()
            raise SessionLostError(problem)
        return session

    def _retire(self, worker: Worker, reason: str) -> None:
        self._on_lost(worker, reason)
        if worker.task:
            worker.task.cancel()
            self._retired.add(worker.task)
            worker.task.add_done_callback(self._retired.discard)

    # ---- what sessions bring

    def _on_connected(self, worker: Worker, session: Session) -> None:
        hello = session.hello
        worker.session, worker.problem, worker.draining = session, "", False
        worker.load = Load(num_free_blocks=hello.num_blocks)
        layout = hello.layout
        cache = layout.contents, layout.block_size
        key = KindKey(hello.role, hello.device, cache, hello.max_model_len, hello.runs_alone)
        self.fleet.add(hello.incarnation, key, hello.credits, hello.num_blocks)
        self._pairs.add(hello, [other for other, _ in self.connected()], self._clock())
        self._connected[hello.incarnation] = worker
        logger.info("worker %s (%s, %s) is connected", hello.worker_id, hello.role.value, hello.incarnation)
        self._connect_pairs()
        self._told().on_change()

    def _on_lost(self, worker: Worker, reason: str) -> None:
        worker.problem = reason
        if worker.session is None:
            return
        worker.session = None
        worker.forget_flushes()
        del self._connected[worker.incarnation]
        self._pairs.remove(worker.incarnation)
        self.fleet.remove(worker.incarnation)
        self._connect_pairs()
        self._told().on_lost(worker.incarnation, reason)
        self._told().on_change()

    def _on_message(self, worker: Worker, message: WorkerMessage) -> None:
        if worker.session is None:
            return  # replaced: what it still says is of no interest
        if message.load:
            self._on_load(worker, message.load)
        for event in message.events:
            self._on_event(worker, event)
        if any(isinstance(event, PairUp | PairDown) for event in message.events):
            self._connect_pairs()
        self._told().on_change()

    def _on_load(self, worker: Worker, load: Load) -> None:
        worker.load = load
        self.fleet.report(
            worker.incarnation,
            num_free_blocks=load.num_free_blocks,
            num_active=load.num_running + load.num_waiting + load.num_held,
            num_waiting_tokens=load.num_waiting_tokens,
        )
        if load.draining:
            self._take_no_work(worker)

    def _take_no_work(self, worker: Worker) -> None:
        worker.draining = True
        self.fleet.take_no_work(worker.incarnation)

    def _on_event(self, worker: Worker, event: Event) -> None:
        match event:
            case PairUp():
                self._pairs.answer_up(worker.incarnation, event, self._clock())
            case PairDown(prefill, decode, epoch, reason):
                if self._pairs.answer_down(event, self._clock()):
                    self._told().on_pair_down(prefill, decode, epoch, reason)
            case CacheFlushed(num_blocks):
                worker.on_flushed(num_blocks)
            case Drained():
                self._take_no_work(worker)
            case CacheChanged():
                self.fleet.tell(worker.incarnation, event)
            case _:
                self._told().on_event(worker.incarnation, event)

    def _connect_pairs(self) -> None:
        """Connect what is due, and wake up for what is due next."""
        self._tell(self._pairs.expire(self._clock()))
        for pair in self._pairs.due(self._clock()):
            self._tell(pair.connects())
        if self._alarm:
            self._alarm.cancel()
        due_s = self._pairs.next_due_s()
        if due_s is not None:
            delay_s = max(0.0, due_s - self._clock())
            self._alarm = asyncio.get_running_loop().call_later(delay_s, self._connect_pairs)
        for (prefill, decode), epoch in self._pairs.take_changes().items():
            if epoch is None:
                self.fleet.pair_down(prefill, decode)
            else:
                self.fleet.pair_up(prefill, decode, epoch)

    def _tell(self, told: Iterable[Told]) -> None:
        for incarnation, command in told:
            self.send(incarnation, command)

    def _told(self) -> WorkerListener:
        assert self._listener is not None, "subscribe() comes first"
        return self._listener
