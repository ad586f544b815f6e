"""The network between router and workers, and between workers, is slow, uneven, silent or cut: nobody who asks notices.

What a default run leaves out is in the chaos suite: `scripts/test -m chaos`.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from cluster.steps import Step
from kv_transfer.config import Backend
from tests.e2e.test_step_faults import SLACK_S, Set, at, sometimes
from tests.faults.control import QUICK, WAIT_S, goes_to_decode, world
from tests.faults.jobs import Answer, all_kinds, check, run
from tests.faults.network import Way

pytestmark = pytest.mark.timeout(180)
FAR = {"tcp": "decode-0", "gloo": "prefill-0"}
"""The worker to which the others of its pairs come, through its proxy, with K and V."""
WORKERS = ("prefill-0", "prefill-1", "decode-0", "decode-1")


@pytest.fixture(scope="module", params=["tcp", pytest.param("gloo", marks=pytest.mark.chaos)])
def over_proxies(request: pytest.FixtureRequest) -> Iterator[Set]:
    backend: Backend = request.param
    jobs, transfer = all_kinds(4, 12), replace(QUICK, backend=backend, connect_timeout_s=2.0)
    with world(transfer=transfer, proxied=True) as made, made.client() as client:
        assert {pair.transport for pair in made.info().pairs} == {backend}
        undisturbed = [answer for job in jobs if isinstance(answer := run(client, job), Answer)]
        assert len(undisturbed) == len(jobs)
        yield Set(made, jobs, undisturbed)


@pytest.fixture
def four(over_proxies: Set) -> Iterator[Set]:
    """Whole and in fine weather before a test and soon after it; no worker may have been started anew."""
    over_proxies.world.wait_until_whole()
    before = over_proxies.incarnations()
    yield over_proxies
    for name in WORKERS:
        for way in ("kv", "session"):
            over_proxies.world.steps.weather(name, way)
    over_proxies.world.wait_until_nothing_is_held(QUICK.lease_s + SLACK_S)
    over_proxies.world.wait_until_whole()
    assert over_proxies.incarnations() == before


def far(four: Set) -> str:
    return FAR[four.world.cluster.config.transfer.backend]


@pytest.mark.parametrize("way", ["kv", "session"])
def test_delays_change_nothing(four: Set, way: Way) -> None:
    """Uneven ones: what comes by one connection overtakes what came before it by another."""
    for name in WORKERS:
        four.world.steps.weather(name, way, delay_s=0.003, jitter_s=0.06)
    check(four.jobs, four.start(), four.undisturbed)


@pytest.mark.parametrize("step", [Step.PUSH, *sometimes(Step.PREFILL, Step.COMMIT)])
def test_kv_goes_another_way_when_a_worker_is_cut_off_from_its_pairs_at(four: Set, step: Step) -> None:
    four.world.steps.arm("prefill-0", step, "hold", 3 if step is Step.PUSH else 0)
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(four.start)
        four.world.steps.reached("prefill-0")
        four.world.steps.weather(far(four), "kv", "cut")
        four.world.steps.go("prefill-0")
        check(four.jobs, asked.result(), four.undisturbed)
    check(four.jobs, four.start(), four.undisturbed)
    name = far(four)
    four.world.wait_until(  # by the others it goes itself, past its own proxy
        lambda info: (
            not any(
                pair.up
                for pair in info.pairs
                if goes_to_decode(pair) and name in (pair.prefill_worker, pair.decode_worker)
            )
        )
    )


def test_a_silent_network_between_workers_is_given_up_in_time_and_used_when_it_speaks_again(four: Set) -> None:
    four.world.steps.arm("prefill-0", Step.PUSH, "hold", 3)
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(four.start)
        four.world.steps.reached("prefill-0")
        four.world.steps.weather(far(four), "kv", "held")
        four.world.steps.go("prefill-0")
        check(four.jobs, asked.result(WAIT_S), four.undisturbed)
        four.world.steps.weather(far(four), "kv")
    four.world.wait_until_whole()
    check(four.jobs, four.start(), four.undisturbed)


@pytest.mark.parametrize(
    "step", [Step.TOKENS, *sometimes(Step.RESERVE, Step.PREFILL, Step.PUSH, Step.COMMIT, Step.ACCEPT, Step.RELEASE)]
)
def test_nobody_notices_that_the_router_lost_its_connection_to_a_worker_at(four: Set, step: Step) -> None:
    name, _, layer = at(step)
    four.world.steps.arm(name, step, "hold", layer)
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(four.start)
        four.world.steps.reached(name)
        four.world.steps.weather(name, "session", "cut")
        four.world.steps.go(name)
        check(four.jobs, asked.result(), four.undisturbed)


@pytest.mark.chaos
@pytest.mark.parametrize("name", ["prefill-0", "decode-0"])
def test_a_worker_that_the_router_does_not_hear_any_more_holds_nothing_after_a_lease(four: Set, name: str) -> None:
    step = Step.PUSH if name == "prefill-0" else Step.TOKENS
    four.world.steps.arm(name, step, "hold", 3 if step is Step.PUSH else 0)
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(four.start)
        four.world.steps.reached(name)
        four.world.steps.weather(name, "session", "held")
        four.world.steps.go(name)
        check(four.jobs, asked.result(), four.undisturbed)
