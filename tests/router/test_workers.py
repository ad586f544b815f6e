"""Keeping in touch: registration, sessions, pairs, drain."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
import pytest

from core.errors import UnavailableError
from penstock.v1 import inference_pb2, worker_pb2_grpc
from penstock.v1 import worker_pb2 as pb
from router.config import DispatchConfig
from router.epochs import wall_clock_epochs
from router.registry_service import RegistryService
from tests.router.fake_tokens import continuation, key_of
from tests.router.fake_worker import FakeWorker
from tests.router.harness import SESSIONS, Harness, harness, pair_of_workers, read

pytestmark = pytest.mark.anyio
PROMPT = [5, 6, 7]
PREFILL, MIXED = inference_pb2.WORKER_ROLE_PREFILL, inference_pb2.WORKER_ROLE_MIXED


# ---- registration


@asynccontextmanager
async def registry(world: Harness) -> AsyncIterator[Any]:
    server = grpc.aio.server()
    RegistryService(world.workers).add_to(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield worker_pb2_grpc.RegistryStub(channel)
    await server.stop(None)


async def test_registering_over_grpc_gets_a_worker_connected() -> None:
    async with harness() as world, registry(world) as stub:
        fake = await FakeWorker("m", "mixed").start()
        world.fakes.append(fake)
        request = pb.RegisterRequest(worker_id="m", incarnation=fake.incarnation, address=fake.address, role=MIXED)
        assert not (await stub.Register(request, timeout=5)).connected
        await world.until_routes(1)
        assert (await stub.Register(request, timeout=5)).connected
        assert fake.num_sessions == 1


@pytest.mark.parametrize(
    ("field", "value"), [("worker_id", ""), ("incarnation", ""), ("address", ""), ("role", 0), ("role", 9)]
)
async def test_a_registration_without_meaning_is_refused(field: str, value: object) -> None:
    async with harness() as world, registry(world) as stub:
        request = pb.RegisterRequest(worker_id="w", incarnation="i", address="127.0.0.1:1", role=PREFILL)
        setattr(request, field, value)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Register(request, timeout=5)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert field in str(caught.value.details())
        assert world.dispatcher.info().workers == ()


async def test_a_worker_out_of_reach_is_forgotten_once_it_registers_no_more() -> None:
    sessions = dataclasses.replace(SESSIONS, forget_after_s=0.1)
    async with harness(sessions=sessions) as world:
        fake = FakeWorker("m", "mixed")
        await world.add(fake)
        await fake.kill()
        await world.seen.until(lambda: not world.connected())
        assert [info.worker_id for info in world.dispatcher.info().workers] == ["m"]
        replacement = FakeWorker("other", "mixed")
        await world.add(replacement)
        await replacement.until(lambda: len(world.dispatcher.info().workers) == 1)
        assert world.dispatcher.info().workers[0].worker_id == "other"


async def test_a_worker_that_restarts_on_its_port_is_found_again_without_a_new_registration() -> None:
    async with harness(FakeWorker("m", "mixed")) as world:
        (fake,) = world.fakes
        port = int(fake.address.rsplit(":", 1)[1])
        await fake.kill()
        await world.until_routes(0)
        await fake.start(port)
        await world.until_routes(1)
        assert (await read(world.submit(PROMPT, 4)))[0] == continuation(PROMPT, 4)
        await world.idle()


async def test_a_new_incarnation_takes_the_place_of_the_old_and_its_requests() -> None:
    async with harness(FakeWorker("m", "mixed")) as world:
        (old,) = world.fakes
        old.pause("tokens")
        stream = world.submit(PROMPT, 12)
        await anext(stream)
        new = FakeWorker("m", "mixed")
        await world.add(new)
        assert (await read(stream))[0] == continuation(PROMPT, 12)[1:]
        (info,) = world.dispatcher.info().workers
        assert info.incarnation == new.incarnation
        assert len(new.commands("prefill")) == 1
        await world.idle()


# ---- sessions


async def test_a_lost_session_is_opened_again() -> None:
    async with pair_of_workers() as (world, prefill, _):
        prefill.drop_session()
        await world.until_routes(0)
        await world.until_routes(1)
        assert prefill.num_sessions == 2
        assert (await read(world.submit(PROMPT, 4)))[0] == continuation(PROMPT, 4)
        await world.idle()


async def test_a_silent_worker_is_taken_for_dead() -> None:
    sessions = dataclasses.replace(SESSIONS, dead_after_s=0.2)
    async with harness(FakeWorker("m1", "mixed"), sessions=sessions) as world:
        (silent,) = world.fakes
        silent.pause("tokens")
        stream = world.submit(PROMPT, 4)
        await anext(stream)
        silent.script.silent = True
        await world.add(FakeWorker("m2", "mixed"))
        assert (await read(stream))[0] == continuation(PROMPT, 4)[1:]
        await world.until_routes(1)
        await world.idle()


async def test_a_worker_that_says_hello_and_nothing_more_is_taken_for_dead() -> None:
    sessions = dataclasses.replace(SESSIONS, dead_after_s=0.1)
    fake = FakeWorker("m", "mixed")
    fake.script.silent = True
    async with harness(fake, sessions=sessions):
        await fake.until(lambda: fake.num_sessions >= 2)


async def test_another_worker_at_the_address_is_not_taken_for_the_one_that_registered() -> None:
    async with harness() as world:
        fake = FakeWorker("m", "mixed")
        fake.script.hello_incarnation = "somebody-else"
        await fake.start()
        world.register(fake)
        await fake.until(lambda: fake.num_sessions >= 2)
        (info,) = world.dispatcher.info().workers
        assert not info.connected
        assert "somebody-else" in info.problem
        await fake.kill()


async def test_a_worker_of_another_wire_version_is_not_connected() -> None:
    async with harness() as world:
        fake = FakeWorker("m", "mixed")
        fake.script.wire_version = 99
        await fake.start()
        world.register(fake)
        await fake.until(lambda: fake.num_sessions >= 2)
        assert world.dispatcher.info().workers[0].problem == "wire version: got 99, this router speaks 1"
        await fake.kill()


async def test_a_worker_that_serves_another_model_is_not_connected() -> None:
    async with harness(fingerprint="f00d") as world:
        fake = FakeWorker("m", "mixed", fingerprint="beef")
        await fake.start()
        world.register(fake)
        await fake.until(lambda: fake.num_sessions >= 2)
        assert "another model" in world.dispatcher.info().workers[0].problem
        await fake.kill()


async def test_heartbeats_list_what_lives_on_that_worker_and_nothing_else() -> None:
    async with pair_of_workers() as (world, prefill, decode):
        decode.pause("tokens")
        stream = world.submit(PROMPT, 12)
        accept = await decode.until_received("accept")
        transfer_id, _ = key_of(accept.ticket)
        await prefill.until_received("release")
        prefill.heartbeats.clear()
        decode.heartbeats.clear()
        await decode.until(lambda: bool(decode.heartbeats))
        await prefill.until(lambda: bool(prefill.heartbeats))
        assert decode.heartbeats[0] == (transfer_id,)
        assert prefill.heartbeats[0] == ()
        decode.resume("tokens")
        await read(stream)
        await world.idle()


async def test_a_cancelled_attempts_lease_is_not_renewed_though_the_worker_has_not_let_go() -> None:
    async with pair_of_workers() as (world, _, decode):
        decode.script.no_release = True
        decode.pause("tokens")
        stream = world.submit(PROMPT, 12)
        await decode.until_received("accept")
        stream.cancel()
        await decode.until_received("cancel")
        decode.heartbeats.clear()
        await decode.until(lambda: bool(decode.heartbeats))
        assert decode.heartbeats[0] == ()


# ---- pairs


async def test_both_workers_are_told_where_to_meet_and_what_the_other_looks_like() -> None:
    async with pair_of_workers() as (_, prefill, decode):
        (to_prefill,), (to_decode,) = prefill.commands("connect"), decode.commands("connect")
        assert to_prefill.epoch == to_decode.epoch == 1
        assert to_prefill.store_address == to_decode.store_address == "kv-of-decode-0:1"
        assert to_prefill.decode_incarnation == decode.incarnation
        assert to_decode.prefill_incarnation == prefill.incarnation
        assert to_prefill.peer_layout.num_layers == 2


async def test_a_pair_is_up_only_when_both_said_so() -> None:
    prefill, decode = FakeWorker("p", "prefill"), FakeWorker("d", "decode")
    decode.pause("connect")
    async with harness(prefill, decode) as world:
        await prefill.until_received("connect")
        await prefill.until(lambda: len(prefill.heartbeats) > 3)
        (pair,) = world.dispatcher.info().pairs
        assert not pair.up
        assert not world.dispatcher.can_serve
        decode.resume("connect")
        await world.until_routes(1)
        assert world.dispatcher.can_serve


async def test_a_pair_that_went_down_comes_back_under_a_new_epoch() -> None:
    async with pair_of_workers() as (world, prefill, decode):
        decode.pause("accept")
        stream = world.submit(PROMPT, 12)
        await decode.until_received("accept")
        decode.script.pairs_fail = 2
        prefill.say(down(decode.commands("connect")[0]))
        await decode.until_received("connect", 4)
        decode.resume("accept")
        assert (await read(stream))[0] == continuation(PROMPT, 12)
        assert [connect.epoch for connect in decode.commands("connect")] == [1, 2, 3, 4]
        assert world.dispatcher.counts.failures == {"pair_down": 1}
        assert prefill.commands("prefill")[-1].ticket.pair_epoch == 4
        await world.idle()


async def test_a_word_about_an_older_epoch_does_not_take_a_pair_down() -> None:
    async with pair_of_workers() as (world, prefill, decode):
        first = prefill.commands("connect")[0]
        prefill.say(down(first))
        await decode.until_received("connect", 2)
        await world.until_routes(1)
        prefill.say(down(first))
        assert (await read(world.submit(PROMPT, 4)))[0] == continuation(PROMPT, 4)
        assert world.dispatcher.info().pairs[0].up
        await world.idle()


async def test_decoding_goes_on_when_the_pair_goes_down_after_the_handover() -> None:
    async with pair_of_workers() as (world, prefill, decode):
        decode.pause("tokens")
        stream = world.submit(PROMPT, 12)
        await prefill.until_received("release")
        prefill.say(down(prefill.commands("connect")[0]))
        await decode.until_received("connect", 2)
        decode.resume("tokens")
        assert (await read(stream))[0] == continuation(PROMPT, 12)
        assert stream.stats.num_attempts == 1
        await world.idle()


async def test_a_pair_that_can_never_be_is_not_tried_again() -> None:
    prefill, decode = FakeWorker("p", "prefill"), FakeWorker("d", "decode")
    decode.script.pairs_permanent = True
    async with harness(prefill, decode, dispatch=DispatchConfig(unavailable_timeout_s=0.1)) as world:
        await decode.until(lambda: bool(decode.commands("connect")))
        with pytest.raises(UnavailableError, match="no pair of workers is up: the peer is away"):
            await read(world.submit(PROMPT))
        assert len(decode.commands("connect")) == 1


async def test_a_worker_that_comes_back_is_paired_anew() -> None:
    async with pair_of_workers() as (world, prefill, decode):
        decode.drop_session()
        await world.until_routes(0)
        assert world.dispatcher.info().pairs == ()
        await world.until_routes(1)
        assert [connect.epoch for connect in prefill.commands("connect")] == [1, 2]


def test_epochs_rise_over_restarts_and_within_a_second() -> None:
    seconds = iter([1000.9, 1000.95, 1002.0])
    first = wall_clock_epochs(lambda: next(seconds))
    assert [first(), first(), first()] == [1000, 1001, 1002]


# ---- drain


async def test_a_draining_worker_finishes_what_it_has_and_gets_no_more() -> None:
    async with harness(FakeWorker("m1", "mixed"), FakeWorker("m2", "mixed")) as world:
        await world.until_routes(4)
        leaving, staying = world.fakes
        leaving.pause("tokens")
        staying.pause("tokens")
        streams = [world.submit(PROMPT, 4) for _ in range(2)]
        await leaving.until_received("prefill")
        assert world.workers.drain("m1", deadline_s=5.0)
        await leaving.until_received("drain")
        streams += [world.submit(PROMPT, 4) for _ in range(4)]
        leaving.resume("tokens")
        staying.resume("tokens")
        for stream in streams:
            assert (await read(stream))[0] == continuation(PROMPT, 4)
        assert len([prefill for prefill in leaving.commands("prefill") if not prefill.handover]) == 1
        assert [info.draining for info in world.dispatcher.info().workers] == [True, False]
        await world.idle()


async def test_a_worker_that_says_it_drains_gets_no_more() -> None:
    async with harness(FakeWorker("m1", "mixed"), FakeWorker("m2", "mixed")) as world:
        await world.until_routes(4)
        leaving, staying = world.fakes
        leaving.say(load=leaving.load(draining=True))
        await world.until_routes(1)
        for _ in range(3):
            await read(world.submit(PROMPT, 4))
        assert leaving.commands("prefill") == []
        assert len(staying.commands("prefill")) == 3
        await world.idle()


async def test_only_a_connected_worker_can_be_drained() -> None:
    async with harness() as world:
        assert not world.workers.drain("nobody", deadline_s=1.0)


def down(connect: pb.Connect) -> pb.Event:
    return pb.Event(
        pair_down=pb.PairDown(
            prefill_incarnation=connect.prefill_incarnation,
            decode_incarnation=connect.decode_incarnation,
            epoch=connect.epoch,
            reason="the cable was pulled",
        )
    )
