"""Whoever lets go of a generation, the server hears of it."""

from __future__ import annotations

import asyncio
import gc
import threading

import pytest

from penstock import AsyncClient, Client, RequestCancelledError
from tests.client.conftest import Connect, Sdk
from tests.client.fake_server import DEADLINE_S, FakeServer, delta, says, started


def hold(server: FakeServer) -> None:
    server.play(server.holds(started(), delta("a", 1), delta("b", 2)))


def assert_cancelled(server: FakeServer, prompt: str = "hi") -> None:
    assert server.cancelled.get(timeout=DEADLINE_S) == prompt


def test_close_cancels_on_the_server(sdk: Sdk, server: FakeServer) -> None:
    hold(server)
    generation = sdk.generate()
    sdk.read(generation)
    sdk.close_generation(generation)
    assert_cancelled(server)


def test_reading_a_closed_generation_says_that_it_was_closed(sdk: Sdk, server: FakeServer) -> None:
    hold(server)
    generation = sdk.generate(request_id="mine")
    sdk.read(generation)
    sdk.close_generation(generation)
    with pytest.raises(RequestCancelledError, match=r"closed by this client \(1 tokens had come\)") as caught:
        sdk.text(generation)
    assert (caught.value.request_id, caught.value.num_tokens) == ("req-1", 1)


def test_close_after_the_end_changes_nothing(sdk: Sdk, server: FakeServer) -> None:
    server.play(says("a"))
    generation = sdk.generate()
    sdk.text(generation)
    sdk.close_generation(generation)
    sdk.close_generation(generation)
    assert sdk.text(generation) == "a"


def test_closing_the_client_cancels_what_is_running(connect: Connect, server: FakeServer) -> None:
    hold(server)
    sdk = connect()
    generation = sdk.generate()
    sdk.read(generation)
    sdk.call("close")
    assert_cancelled(server)
    with pytest.raises(RequestCancelledError):
        sdk.read_all(generation)


def test_dropping_the_last_reference_cancels(sdk: Sdk, server: FakeServer) -> None:
    hold(server)
    generation = sdk.generate()
    sdk.read(generation)
    del generation
    gc.collect()
    assert_cancelled(server)


def test_dropping_a_generation_that_nobody_read_cancels(sdk: Sdk, server: FakeServer) -> None:
    hold(server)
    generation = sdk.generate()
    assert server.arrived.get(timeout=DEADLINE_S) == "hi"
    del generation
    gc.collect()
    assert_cancelled(server)


def test_break_cancels_without_a_garbage_collection(server: FakeServer) -> None:
    hold(server)
    gc.disable()
    try:
        with Client(server.target) as client:
            for _ in client.generate("hi"):
                break
            assert_cancelled(server)
    finally:
        gc.enable()


def test_leaving_the_with_block_cancels(server: FakeServer) -> None:
    hold(server)
    with Client(server.target) as client, client.generate("hi") as generation:
        next(generation)
        generation.close()
        assert_cancelled(server)


def test_close_from_another_thread_frees_the_reader(server: FakeServer) -> None:
    hold(server)
    with Client(server.target) as client:
        generation = client.generate("hi")
        next(generation)
        next(generation)
        closer = threading.Thread(target=generation.close)
        closer.start()
        with pytest.raises(RequestCancelledError):
            next(generation)
        closer.join(DEADLINE_S)


@pytest.mark.anyio
async def test_break_cancels_without_a_garbage_collection_in_asyncio(server: FakeServer) -> None:
    hold(server)
    gc.disable()
    try:
        async with AsyncClient(server.target) as client:
            async for _ in client.generate("hi"):
                break
            await asyncio.to_thread(assert_cancelled, server)
    finally:
        gc.enable()


@pytest.mark.anyio
async def test_leaving_the_async_with_block_cancels(server: FakeServer) -> None:
    hold(server)
    async with AsyncClient(server.target) as client:
        async with client.generate("hi") as generation:
            await anext(generation)
        await asyncio.to_thread(assert_cancelled, server)


@pytest.mark.anyio
async def test_aclose_by_another_task_frees_the_reader(server: FakeServer) -> None:
    hold(server)
    async with AsyncClient(server.target) as client:
        generation = client.generate("hi")
        await anext(generation)
        reader = asyncio.create_task(generation.text())
        await asyncio.sleep(0)
        await generation.aclose()
        with pytest.raises(RequestCancelledError):
            await asyncio.wait_for(reader, DEADLINE_S)


@pytest.mark.anyio
async def test_cancelling_the_reading_task_cancels_on_the_server(server: FakeServer) -> None:
    hold(server)
    async with AsyncClient(server.target) as client:
        generation = client.generate("hi")
        await anext(generation)
        await anext(generation)
        reader = asyncio.create_task(anext(generation))
        await asyncio.sleep(0)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        await asyncio.to_thread(assert_cancelled, server)
        with pytest.raises(RequestCancelledError):
            await generation.text()


@pytest.mark.anyio
async def test_a_timeout_of_the_caller_is_not_mistaken_for_a_cancelled_request(server: FakeServer) -> None:
    hold(server)
    async with AsyncClient(server.target) as client:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await client.generate("hi").text()
        await asyncio.to_thread(assert_cancelled, server)


@pytest.mark.anyio
async def test_last_reference_may_be_dropped_in_another_thread(server: FakeServer) -> None:
    hold(server)
    async with AsyncClient(server.target) as client:
        box = [client.generate("hi")]
        await anext(box[0])
        await asyncio.to_thread(box.clear)
        await asyncio.to_thread(assert_cancelled, server)
