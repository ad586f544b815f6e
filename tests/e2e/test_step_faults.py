"""Workers and the router die, freeze or lie at named steps of the protocol: whoever asked sees nothing of it.

The steps that a default run leaves out are in the chaos suite: `scripts/test -m chaos`.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event
from typing import Any, Literal

import pytest

from cluster.steps import Step
from tests.faults.control import QUICK, World, world
from tests.faults.jobs import Answer, Failed, all_kinds, check, run, run_all

pytestmark = pytest.mark.timeout(180)
LAYER = 3
SLACK_S = 5.0
"""For a loaded machine, and for the period at which leases are looked at."""


@dataclass(frozen=True)
class Set:
    """A cluster of four, requests of every kind, and what they give where nothing happens."""

    world: World
    jobs: Sequence[Mapping[str, Any]]
    undisturbed: Sequence[Answer]

    def start(self) -> Sequence[Answer | Failed]:
        with self.world.client() as client:
            return run_all(client, self.jobs)

    def incarnations(self) -> dict[str, str]:
        return {w.worker_id: w.incarnation for w in self.world.info().workers if w.connected}


@pytest.fixture(scope="module")
def whole_set() -> Iterator[Set]:
    jobs = all_kinds(3, 16)
    with world() as made, made.client() as client:
        undisturbed = [answer for job in jobs if isinstance(answer := run(client, job), Answer)]
        assert len(undisturbed) == len(jobs)
        yield Set(made, jobs, undisturbed)


@pytest.fixture
def four(whole_set: Set) -> Iterator[Set]:
    """Whole before a test; afterwards the books of all workers must balance within a lease."""
    whole_set.world.wait_until_whole()
    yield whole_set
    whole_set.world.wait_until_nothing_is_held(QUICK.lease_s + SLACK_S)


def sometimes(*steps: Step) -> list[Any]:
    return [pytest.param(step, marks=pytest.mark.chaos) for step in steps]


def at(step: Step) -> tuple[str, Step, int]:
    """The worker that takes the step, and the layer."""
    role = "decode" if step in (Step.RESERVE, Step.ACCEPT, Step.TOKENS) else "prefill"
    return f"{role}-0", step, LAYER if step is Step.PUSH else 0


@pytest.mark.parametrize(
    "step",
    [Step.PUSH, Step.TOKENS, *sometimes(Step.RESERVE, Step.PREFILL, Step.COMMIT, Step.ACCEPT, Step.RELEASE)],
)
def test_nobody_notices_that_a_worker_is_killed_at(four: Set, step: Step) -> None:
    name, _, layer = at(step)
    before = four.incarnations()
    four.world.steps.arm(name, step, "kill", layer)
    check(four.jobs, four.start(), four.undisturbed)
    four.world.wait_until_whole()
    after = four.incarnations()
    assert {other for other in before if after[other] != before[other]} == {name}


@pytest.mark.parametrize("step", [Step.ACCEPT, *sometimes(Step.RESERVE, Step.PUSH, Step.COMMIT, Step.TOKENS)])
def test_nobody_notices_that_both_workers_of_a_pair_are_killed_at(four: Set, step: Step) -> None:
    name, _, layer = at(step)
    four.world.steps.arm(name, step, "hold", layer)
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(four.start)
        four.world.steps.reached(name)
        four.world.kill("prefill-0")
        four.world.kill("decode-0")
        check(four.jobs, asked.result(), four.undisturbed)


@pytest.mark.parametrize("step", [Step.PUSH, *sometimes(Step.RESERVE, Step.COMMIT, Step.ACCEPT, Step.TOKENS)])
def test_a_worker_that_slept_past_its_lease_harms_nobody_when_it_wakes(four: Set, step: Step) -> None:
    """While it sleeps its attempts end and their blocks get new owners, who have committed by the time it goes on."""
    name, _, layer = at(step)
    four.world.steps.arm(name, step, "freeze", layer)
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(four.start)
        pid = four.world.steps.reached(name)
        frozen_at = time.monotonic()
        check(four.jobs, asked.result(), four.undisturbed)
        while time.monotonic() < frozen_at + QUICK.lease_s + 0.5:
            check(four.jobs, four.start(), four.undisturbed)
        again = threads.submit(four.start)
        os.kill(pid, signal.SIGCONT)
        check(four.jobs, again.result(), four.undisturbed)


@pytest.mark.parametrize(
    "step",
    [*sometimes(Step.RESERVE, Step.PREFILL, Step.PUSH, Step.COMMIT, Step.ACCEPT, Step.RELEASE, Step.TOKENS)],
)
def test_nobody_notices_that_a_worker_is_slow_at(four: Set, step: Step) -> None:
    """By less than a lease: nothing needs to be tried again."""
    name, _, layer = at(step)
    before = four.incarnations()
    four.world.steps.arm(name, step, "sleep", layer, QUICK.lease_s / 2)
    check(four.jobs, four.start(), four.undisturbed)
    assert four.incarnations() == before


@pytest.mark.parametrize("name", ["router", "prefill-0", "decode-0"])
def test_nobody_notices_a_process_that_hardly_gets_any_time(four: Set, name: str) -> None:
    before = four.incarnations()
    with four.world.slowed(name):
        check(four.jobs, four.start(), four.undisturbed)
    assert four.incarnations() == before


@pytest.mark.parametrize(
    "step", [Step.PUSH, *sometimes(Step.RESERVE, Step.PREFILL, Step.COMMIT, Step.ACCEPT, Step.RELEASE, Step.TOKENS)]
)
def test_nobody_notices_that_the_router_stood_still_past_all_leases_at(four: Set, step: Step) -> None:
    """Workers let go of what nobody renewed; the router finds that out when it wakes, and resumes."""
    name, _, layer = at(step)
    before, router = four.incarnations(), four.world.pid("router")
    four.world.steps.arm(name, step, "hold", layer)
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(four.start)
        four.world.steps.reached(name)
        os.kill(router, signal.SIGSTOP)
        four.world.steps.go(name)
        Event().wait(QUICK.lease_s + 0.5)  # nothing tells that a lease has ended but what is tested
        os.kill(router, signal.SIGCONT)
        check(four.jobs, asked.result(), four.undisturbed)
    assert four.incarnations() == before
    assert four.world.pid("router") == router


@pytest.mark.parametrize("action", ["damage", "cut"])
def test_what_is_broken_on_its_way_is_not_decoded(four: Set, action: Literal["damage", "cut"]) -> None:
    four.world.steps.arm("prefill-0", Step.PUSH, action, LAYER)
    before = four.incarnations()
    check(four.jobs, four.start(), four.undisturbed)
    four.world.steps.reached("prefill-0")
    assert four.incarnations() == before


@pytest.mark.parametrize("step", [Step.TOKENS, *sometimes(Step.RESERVE, Step.PUSH, Step.COMMIT, Step.ACCEPT)])
def test_a_killed_router_is_told_to_those_who_asked_and_leaves_nothing_held(four: Set, step: Step) -> None:
    name, _, layer = at(step)
    before = four.incarnations()
    four.world.steps.arm(name, step, "hold", layer)
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(four.start)
        four.world.steps.reached(name)
        four.world.kill("router")
        four.world.steps.go(name)
        answers = asked.result()
    for answer, expected in zip(answers, four.undisturbed, strict=True):
        assert answer == expected or (isinstance(answer, Failed) and answer.code == "UNAVAILABLE"), answer
    four.world.wait_until_whole()
    assert four.incarnations() == before
    check(four.jobs, four.start(), four.undisturbed)
