"""Both sides of a transfer, the router and the network, in every order that hypothesis can think of."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from cluster.worker import EXPIRY_INTERVAL_S
from tests.faults.sim_worker import LIMITS, SimWorker
from tests.faults.simulation import Job, Simulation

ROUNDS = 200
"""After so many in which nothing goes wrong, every request has its answer."""
names = st.sampled_from(["p", "d0", "d1"])
decodes = st.sampled_from(["d0", "d1"])
numbers = st.integers(min_value=0, max_value=10**6)
lengths = st.integers(min_value=1, max_value=18)
fates = st.sampled_from(["again", "damaged", "short", "lost"])


class World(RuleBasedStateMachine):
    """Messages come late, twice, in another order or not at all; anybody dies, sleeps or changes his mind."""

    def __init__(self) -> None:
        super().__init__()
        self.sim = Simulation()

    def job(self, which: int) -> Job:
        jobs = list(self.sim.jobs.values())
        return jobs[which % len(jobs)]

    def one_with(self, which: int, has: Callable[[SimWorker], object]) -> SimWorker:
        found = [worker for worker in self.sim.workers.values() if has(worker)]
        return found[which % len(found)]

    def placed(self, which: int) -> Job:
        jobs = [job for job in self.sim.jobs.values() if job.stage]
        return jobs[which % len(jobs)]

    def begin_again(self, job: Job, decode: SimWorker) -> None:
        """The next attempt, on the same pair; the decode worker hears of it."""
        self.sim.place(job, decode.name)
        while decode.commands:
            self.sim.obey(decode)
        decode.turn()

    # ---- what happens anyway

    @initialize(lengths=st.lists(lengths, min_size=2, max_size=4))
    def begin(self, lengths: list[int]) -> None:
        for i, length in enumerate(lengths):
            self.submit(length, 2 + i, "d0")

    @precondition(lambda self: len(self.sim.jobs) < 5)
    @rule(length=lengths, max_tokens=st.integers(min_value=1, max_value=9), name=decodes)
    def submit(self, length: int, max_tokens: int, name: str) -> None:
        self.sim.submit(tuple(range(10, 10 + length)), max_tokens)
        self.sim.place(list(self.sim.jobs.values())[-1], name)

    @precondition(lambda self: any(job.stage is None for job in self.sim.jobs.values()))
    @rule(name=decodes)
    def place(self, name: str) -> None:
        for job in self.sim.jobs.values():
            self.sim.place(job, name)

    @precondition(lambda self: any(worker.commands for worker in self.sim.workers.values()))
    @rule(which=numbers, all_of_them=st.booleans())
    def obey(self, which: int, all_of_them: bool) -> None:
        worker = self.one_with(which, lambda worker: worker.commands)
        for _ in range(len(worker.commands) if all_of_them else 1):
            self.sim.obey(worker)

    @rule(name=names, num_turns=st.integers(min_value=1, max_value=3))
    def turn(self, name: str, num_turns: int) -> None:
        worker = self.sim.workers[name]
        for _ in range(num_turns):
            worker.turn()

    @precondition(lambda self: any(worker.session.events for worker in self.sim.workers.values()))
    @rule(which=numbers)
    def hear(self, which: int) -> None:
        worker = self.one_with(which, lambda worker: worker.session.events)
        while worker.session.events:
            self.sim.hear(worker)

    @precondition(lambda self: any(link.outbox and not link.closed for link in self.sim.links.values()))
    @rule(num_segments=st.integers(min_value=1, max_value=8))
    def leave(self, num_segments: int) -> None:
        for link in self.sim.links.values():
            for _ in range(num_segments):
                self.sim.leave(link)

    @precondition(lambda self: self.sim.wire)
    @rule(which=numbers, num_segments=st.integers(min_value=1, max_value=8))
    def arrive(self, which: int, num_segments: int) -> None:
        for _ in range(num_segments):
            self.sim.arrive(which, "whole")

    @precondition(lambda self: self.sim.wire)
    @rule(which=numbers, fate=fates)
    def arrive_otherwise(self, which: int, fate: str) -> None:
        self.sim.arrive(which, fate)

    @rule(spoiled=st.integers(min_value=0, max_value=7), fate=fates)
    def everything_comes_but_one(self, spoiled: int, fate: str) -> None:
        self.sim.run(spoiled, fate)

    @rule(num_rounds=st.integers(min_value=1, max_value=3))
    def everything_comes(self, num_rounds: int) -> None:
        for _ in range(num_rounds):
            self.sim.run()

    @rule(seconds=st.sampled_from([0.3, 1.0, 4.0, 11.0]), heartbeats=st.booleans())
    def wait(self, seconds: float, heartbeats: bool) -> None:
        self.sim.clock.advance(seconds)
        for worker in self.sim.workers.values():
            if heartbeats:
                self.sim.heartbeat(worker)

    # ---- what goes wrong

    @precondition(lambda self: self.sim.jobs)
    @rule(which=numbers)
    def the_client_leaves(self, which: int) -> None:
        self.sim.cancel(self.job(which))

    @precondition(lambda self: any(job.stage for job in self.sim.jobs.values()))
    @rule(which=numbers)
    def the_router_gives_an_attempt_up(self, which: int) -> None:
        self.sim.give_up(self.job(which))

    @precondition(lambda self: self.sim.said)
    @rule(which=numbers)
    def an_old_command_comes_again(self, which: int) -> None:
        self.sim.replay(which)

    @precondition(lambda self: any(job.stage for job in self.sim.jobs.values()))
    @rule(which=numbers)
    def an_attempt_follows_another_at_once(self, which: int) -> None:
        """On the same pair, while the segments of the one before are on their way."""
        job = self.placed(which)
        decode = job.workers[1]
        self.sim.give_up(job)
        self.begin_again(job, decode)
        while self.sim.wire:
            self.sim.arrive(0, "whole")

    @precondition(lambda self: any(job.stage for job in self.sim.jobs.values()))
    @rule(which=numbers)
    def a_session_breaks_and_its_worker_hears_of_the_next_attempt_first(self, which: int) -> None:
        job = self.placed(which)
        decode = job.workers[1]
        self.sim.lose_session(decode, noticed=False)
        self.begin_again(job, decode)

    @precondition(lambda self: any(link.outbox for link in self.sim.links.values()) or self.sim.wire)
    @rule(lost=st.booleans())
    def what_is_sent_comes_after_the_lease_or_never(self, lost: bool) -> None:
        """The sender slept, say, and nobody has looked at the lease since."""
        for link in self.sim.links.values():
            while link.outbox and not link.closed:
                self.sim.leave(link)
        if not lost:
            self.sim.clock.advance(LIMITS.lease_s + 0.1)
        while self.sim.wire:
            self.sim.arrive(0, "lost" if lost else "whole")

    @rule(name=decodes)
    def a_channel_breaks_in_the_middle_of_a_prompt(self, name: str) -> None:
        prefill = self.sim.workers["p"]
        while prefill.commands:
            self.sim.obey(prefill)
        prefill.turn()
        self.sim.cut(self.sim.links[name])
        prefill.turn()
        self.sim.connect(name)

    @rule(name=names)
    def a_worker_restarts(self, name: str) -> None:
        self.sim.restart(name)

    @rule(name=st.sampled_from(["router", "p", "d0", "d1"]), noticed=st.booleans())
    def sessions_break(self, name: str, noticed: bool) -> None:
        if name == "router":
            self.sim.restart_router(noticed=noticed)
        else:
            self.sim.lose_session(self.sim.workers[name], noticed=noticed)

    @rule(name=decodes, at_once=st.booleans())
    def a_channel_breaks(self, name: str, at_once: bool) -> None:
        self.sim.cut(self.sim.links[name])
        if at_once:
            self.sim.connect(name)

    # ---- what must hold

    @invariant()
    def the_books_balance(self) -> None:
        for worker in self.sim.workers.values():
            worker.check()

    def teardown(self) -> None:
        """Once nothing goes wrong any more every request is answered, and then nothing is held."""
        sim = self.sim
        for name, link in list(sim.links.items()):
            if link.closed:
                sim.connect(name)
        for _ in range(ROUNDS):
            if not sim.jobs:
                break
            for worker in sim.workers.values():
                sim.heartbeat(worker)
            sim.clock.advance(EXPIRY_INTERVAL_S)
            sim.run()
        assert not sim.jobs, [vars(job) for job in sim.jobs.values()]
        for _ in range(2):
            sim.clock.advance(LIMITS.lease_s + EXPIRY_INTERVAL_S)
            sim.run()
        for worker in sim.workers.values():
            worker.assert_nothing_is_held()
        self.an_attempt_that_nothing_disturbs_is_the_only_one()

    def an_attempt_that_nothing_disturbs_is_the_only_one(self) -> None:
        """Every attempt brings a token at least: one that always failed would bring an answer all the same."""
        for name in ("d0", "d1"):
            self.sim.submit(tuple(range(500, 517)), 3)
            (job,) = self.sim.jobs.values()
            self.sim.place(job, name)
            for _ in range(12):
                self.sim.run()
            assert (self.sim.done[-1], job.attempt) == (job, 1)


def test_nothing_leaks_nothing_lies_and_everything_ends() -> None:
    options: Any = {"max_examples": 20, "stateful_step_count": 40, "print_blob": False, "deadline": None}
    run_state_machine_as_test(World, settings=settings(**options))


def history(seed: int) -> int:
    """A long run of the same world, most of it without faults, so that they meet requests in every state.

    Returns how many requests were answered.
    """
    rng = random.Random(seed)
    world = World()
    sim, wire = world.sim, ["whole"] * 9 + ["again", "damaged", "short", "lost"]

    def name(*among: str) -> str:
        return rng.choice(among or ("p", "d0", "d1"))

    def obey() -> None:
        for worker in rng.sample(list(sim.workers.values()), 2):
            for _ in range(rng.choice((1, len(worker.commands)))):
                sim.obey(worker)

    def arrive() -> None:
        for _ in range(rng.randint(1, 8)):
            sim.arrive(rng.randrange(1000), rng.choice(wire))

    def hear() -> None:
        worker = sim.workers[name()]
        while worker.session.events:
            sim.hear(worker)

    def with_a_job(what: Callable[[Job], None]) -> None:
        if sim.jobs:
            what(rng.choice(list(sim.jobs.values())))

    def with_a_placed_job(what: Callable[[int], None]) -> None:
        if any(job.stage for job in sim.jobs.values()):
            what(rng.randrange(1000))

    usual: list[Callable[[], object]] = [
        obey,
        arrive,
        hear,
        sim.run,
        lambda: world.turn(name(), rng.randint(1, 3)),
        lambda: world.leave(rng.randint(1, 8)),
        lambda: world.place(name("d0", "d1")),
        lambda: world.submit(rng.randint(1, 18), rng.randint(1, 9), name("d0", "d1")),
        lambda: world.wait(rng.choice((0.1, 0.1, 1.0, 4.0)), rng.random() < 0.8),
    ]
    faults: list[Callable[[], object]] = [
        lambda: sim.run(rng.randrange(8), rng.choice(wire[9:])),
        lambda: with_a_job(sim.cancel),
        lambda: with_a_job(sim.give_up),
        *[lambda: sim.replay(rng.randrange(1000))] * 3,
        lambda: with_a_placed_job(world.an_attempt_follows_another_at_once),
        lambda: with_a_placed_job(world.a_session_breaks_and_its_worker_hears_of_the_next_attempt_first),
        lambda: world.what_is_sent_comes_after_the_lease_or_never(rng.random() < 0.5),
        lambda: world.a_channel_breaks_in_the_middle_of_a_prompt(name("d0", "d1")),
        lambda: sim.restart(name()),
        lambda: world.sessions_break(name("router", "p", "d0", "d1"), rng.random() < 0.5),
        lambda: world.a_channel_breaks(name("d0", "d1"), rng.random() < 0.7),
        lambda: world.wait(6.0, False),
    ]
    for _ in range(60):
        rng.choice(usual if rng.random() < 0.8 else faults)()
        world.the_books_balance()
    world.teardown()
    return len(sim.done)


def test_nothing_leaks_or_lies_in_long_histories() -> None:
    assert sum(map(history, range(150))) > 500, "hardly any request gets an answer"
