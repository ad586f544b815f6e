"""A router, a prefill and two decode workers in one thread, on one clock, over a network that does what a test says.

The workers are those of `sim_worker`. Every token that comes is compared with what must come.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from core.clock import ManualClock
from core.messages import (
    Accept,
    Accepted,
    AttemptFailed,
    Cancel,
    Command,
    Heartbeat,
    Prefill,
    Prefilled,
    Refused,
    Release,
    Reserve,
    Reserved,
    StepTokens,
    Work,
    WorkerRole,
)
from core.request import FinishReason
from core.sampling import SamplingParams
from core.ticket import AttemptKey, Ticket
from kv_transfer.frame import Entry
from kv_transfer.outbox import Outgoing
from tests.faults.sim_worker import Link, SimWorker, next_token


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

    def give_up(self, job: Job, lost: SimWorker | None = None) -> None:
        """The attempt has failed, or takes too long: both workers are told, but one that was lost; it is to be tried
        again."""
        if job.ticket is not None and job.stage is not None:
            for worker in job.workers:
                if worker is not lost:
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
            worker.check_pair_is_down(link)
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
                self.give_up(job, worker)

    def restart_router(self, *, noticed: bool) -> None:
        """Nobody knows of any request any more."""
        self.jobs.clear()
        for worker in self.workers.values():
            worker.break_session(noticed=noticed)

    def replay(self, which: int) -> None:
        """A command that was said before comes once more, late; every other time one that begins something."""
        kinds = (Reserve, Prefill) if which % 2 else (Reserve, Prefill, Accept, Release, Cancel)
        said = [(name, command) for name, command in self.said if isinstance(command, kinds)]
        if said:
            name, command = said[which // 2 % len(said)]
            self.workers[name].obey(command)

    # ---- time

    def run(self, spoiled: int = -1, fate: str = "whole") -> None:
        """All that is on its way comes, in order, and everybody takes a turn. One segment may have another fate."""
        for job in list(self.jobs.values()):
            self.place(job, "d0" if job.attempt % 2 == 0 else "d1")
        for worker in self.workers.values():
            while worker.commands:
                self.obey(worker)
            worker.turn()
        for link in self.links.values():
            while link.outbox and not link.closed:
                self.leave(link)
        for place in range(len(self.wire)):
            self.arrive(0, fate if place == spoiled else "whole")
        for worker in self.workers.values():
            while worker.session.events:
                self.hear(worker)
