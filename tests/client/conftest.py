"""Both clients behind one door, so that one test speaks of both."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from typing import Any

import anyio.from_thread
import pytest

from penstock import AsyncBatch, AsyncClient, AsyncGeneration, Batch, Client, Delta, Generation, Result
from tests.client.fake_server import FakeServer

AnyGeneration = Generation | AsyncGeneration


class Sdk:
    """A client driven from this thread; the asynchronous one runs in the event loop of `portal`."""

    def __init__(self, client: Client | AsyncClient, portal: anyio.from_thread.BlockingPortal | None) -> None:
        self.client = client
        self._run: Callable[..., Any] = portal.call if portal else lambda function, *args: function(*args)

    def generate(self, prompt: str | None = "hi", **options: Any) -> AnyGeneration:
        started: AnyGeneration = self._run(lambda: self.client.generate(prompt, **options))
        return started

    def read(self, generation: AnyGeneration) -> Delta | None:
        if isinstance(generation, Generation):
            return next(generation, None)
        delta: Delta | None = self._run(anext, generation, None)
        return delta

    def read_all(self, generation: AnyGeneration) -> list[Delta]:
        return list(iter(lambda: self.read(generation), None))

    def text(self, generation: AnyGeneration) -> str:
        text: str = generation.text if isinstance(generation, Generation) else self._run(generation.text)
        return text

    def close_generation(self, generation: AnyGeneration) -> None:
        self._run(generation.close if isinstance(generation, Generation) else generation.aclose)

    def batch(self, prompts: Any, **options: Any) -> Batch | AsyncBatch:
        started: Batch | AsyncBatch = self._run(lambda: self.client.generate_batch(prompts, **options))
        return started

    def results(self, batch: Batch | AsyncBatch) -> list[Result]:
        results: list[Result] = batch.results if isinstance(batch, Batch) else self._run(batch.results)
        return results

    def next_of(self, iterator: Any) -> Any:
        """Of a batch, or of any generator; None at its end."""
        if hasattr(iterator, "__anext__"):
            return self._run(anext, iterator, None)
        return next(iterator, None)

    def close_iterator(self, iterator: Any) -> None:
        self._run(iterator.aclose if hasattr(iterator, "aclose") else iterator.close)

    def run(self, ask: Callable[[Any], Any]) -> Any:
        """What a call of the client answers."""
        return ask(self.client) if isinstance(self.client, Client) else self._run(ask, self.client)

    def start(self, begin: Callable[[Any], Any]) -> Any:
        """A generator of the client's, not begun yet."""
        return begin(self.client)

    def call(self, name: str, *args: Any) -> Any:
        """A method of the client other than `generate`."""
        return self._run(getattr(self.client, name), *args)


def _as_coroutine(sleep: Callable[[float], None]) -> Callable[[float], Awaitable[None]]:
    async def sleep_(delay_s: float) -> None:
        sleep(delay_s)

    return sleep_


Connect = Callable[..., Sdk]


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    yield fake
    fake.stop()


@pytest.fixture(params=["sync", "async"])
def connect(request: pytest.FixtureRequest, server: FakeServer) -> Iterator[Connect]:
    """Makes clients of `server`, or of the `target` it is given."""
    with ExitStack() as stack:
        portal = None
        if request.param == "async":
            portal = stack.enter_context(anyio.from_thread.start_blocking_portal("asyncio"))

        def make(target: str = server.target, sleep: Callable[[float], None] | None = None, **options: Any) -> Sdk:
            if sleep:
                options["sleep"] = _as_coroutine(sleep) if portal else sleep
            client = AsyncClient(target, **options) if portal else Client(target, **options)
            sdk = Sdk(client, portal)
            stack.callback(sdk.call, "close")
            return sdk

        yield make


@pytest.fixture
def sdk(connect: Connect) -> Sdk:
    return connect()
