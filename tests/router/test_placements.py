"""Requests go where the policy says, for reasons that are kept and counted."""

from __future__ import annotations

import pytest

from core.block_hash import block_hash, root_hash
from core.errors import UnavailableError
from core.request import Disaggregation
from penstock.v1 import worker_pb2 as pb
from router.config import DispatchConfig, PlacementConfig
from router.policies.model import Placement
from tests.router.fake_tokens import continuation
from tests.router.fake_worker import FakeWorker
from tests.router.harness import Harness, harness, read

pytestmark = pytest.mark.anyio


def placement_of(world: Harness, request_id: str) -> Placement:
    placement = world.seen.entries[request_id].placement
    assert placement is not None
    return placement


async def test_round_robin_goes_round_the_workers() -> None:
    fakes = [FakeWorker(f"m{i}", "mixed") for i in range(3)]
    async with harness(*fakes, placement=PlacementConfig(policy="round_robin")) as world:
        streams = [world.submit([i], 3) for i in range(6)]
        for stream in streams:
            await read(stream)
        assert [len(fake.commands("prefill")) for fake in fakes] == [2, 2, 2]
        assert world.dispatcher.counts.placements == {"local": 6, "next_in_turn": 6}
        await world.idle()


async def test_what_workers_take_is_learned() -> None:
    async with harness(FakeWorker("p", "prefill"), FakeWorker("d", "decode")) as world:
        await world.until_routes(1)
        await read(world.submit([1, 2, 3], 8))
        by_role = {kind.role.value: kind for kind in world.workers.fleet.kinds.values()}
        prefill, decode = by_role["prefill"], by_role["decode"]
        assert prefill.prefill.num_readings == prefill.link(decode).num_readings == 1
        assert decode.step.num_readings == 6  # neither the first token nor the handover is a step
        assert world.workers.fleet.output_tokens.value == 8
        await world.idle()


def tell_cached(fake: FakeWorker, token_ids: list[int]) -> None:
    """The worker says that it has the full blocks of these tokens."""
    names = [root_hash(f"{fake.fingerprint}  float32")]
    for i in range(fake.block_size, len(token_ids) + 1, fake.block_size):
        names.append(block_hash(names[-1], token_ids[i - fake.block_size : i]))
    fake.say(pb.Event(cache_changed=pb.CacheChanged(stored=names[1:])))


async def test_a_worker_that_tells_of_the_prompts_blocks_gets_the_request() -> None:
    fakes = [FakeWorker(f"m{i}", "mixed") for i in range(4)]
    async with harness(*fakes, placement=PlacementConfig(policy="prefix_aware")) as world:
        prompt = [*range(40)]
        await world.until_routes(16)
        tell_cached(fakes[2], prompt)
        await fakes[2].until(lambda: len(world.workers.fleet.caches) == 2)
        stream = world.submit(prompt, 4, request_id="known")
        await read(stream)
        known = placement_of(world, "known")
        assert (stream.stats.prefill_worker, known.reasons[1], known.policy) == ("m2", "prefix_cached", "prefix_aware")
        assert known.forecast.num_cached_prefill == 32
        salted = world.submit(prompt, 4, request_id="salted", cache_salt="another tenant")
        await read(salted)
        assert placement_of(world, "salted").forecast.num_cached_prefill == 0
        await fakes[2].kill()
        await world.seen.until(lambda: world.workers.fleet.caches.bit(fakes[2].incarnation) == 0)
        await world.idle()


# ---- on one worker or two


def prefill_and_decode() -> tuple[FakeWorker, FakeWorker]:
    """The decode worker takes prompts, too."""
    decode = FakeWorker("d", "decode")
    decode.script.runs_alone = True
    return FakeWorker("p", "prefill"), decode


async def test_a_decode_worker_reads_a_cheaper_here_itself_unless_two_workers_are_required() -> None:
    cases: list[tuple[Disaggregation, str]] = [("prefer", "d"), ("require", "p"), ("local", "d")]
    async with harness(*prefill_and_decode()) as world:
        await world.until_routes(2)  # the pair, and the decode worker by itself
        for mode, worker in cases:
            stream = world.submit([1, 2, 3], 4, request_id=mode, disaggregate=mode)
            assert (await read(stream))[0] == continuation([1, 2, 3], 4)
            assert (stream.stats.prefill_worker, stream.stats.decode_worker) == (worker, "d")
        assert placement_of(world, "prefer").reasons == ("local", "cheaper_here")
        await world.idle()


async def test_decode_workers_go_on_alone_when_the_prefill_worker_is_gone() -> None:
    prefill, decode = prefill_and_decode()
    async with harness(prefill, decode, dispatch=DispatchConfig(unavailable_timeout_s=0.05)) as world:
        await world.until_routes(2)
        await prefill.kill()
        await world.until_routes(1)
        assert (await read(world.submit([1, 2, 3], 4)))[0] == continuation([1, 2, 3], 4)
        with pytest.raises(UnavailableError, match="only d is connected"):
            await read(world.submit([1, 2, 3], 4, disaggregate="require"))
        await world.idle()


async def test_a_request_that_a_prefill_worker_failed_goes_on_where_it_decodes() -> None:
    prefill, decode = prefill_and_decode()
    async with harness(prefill, decode) as world:
        await world.until_routes(2)
        world.workers.fleet.workers[decode.incarnation].kind.prefill.observe(3, 60.0)  # so the pair is tried first
        prefill.script.fail["prefill"] = 1
        stream = world.submit([1, 2, 3], 4, request_id="failed")
        assert (await read(stream))[0] == continuation([1, 2, 3], 4)
        assert (stream.stats.prefill_worker, stream.stats.num_attempts) == ("d", 2)
        assert "avoided_failed_worker" in placement_of(world, "failed").reasons
        await world.idle()
