"""The router's half of `Worker.Session`: one long-lived stream to one incarnation of one worker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from core.messages import WIRE_VERSION, Command, Heartbeat, RouterHello, WorkerHello
from core.secret import Secret, draw_nonce
from router.access.network import WorkerNetwork
from router.config import SessionConfig
from router.handshake import Handshake
from router.outbox import Outbox
from router.rpc import SessionLostError, WorkerCall, WorkerMessage

MAX_MESSAGE_TOKENS = 4096


class Session:
    """Commands out, events in. `send` never waits; `run` lives as long as the stream does.

    A session that brings nothing for `dead_after_s` is dead, as is one whose worker ends it. A lost session never comes
    back: the worker fences what it carried, and so does the router.
    """

    def __init__(self, call: WorkerCall, hello: WorkerHello, config: SessionConfig) -> None:
        self.hello = hello
        self._call = call
        self._config = config
        self._outbox = Outbox()
        self._pending = asyncio.Event()

    @classmethod
    async def open(
        cls, address: str, router: RouterHello, config: SessionConfig, network: WorkerNetwork | None = None
    ) -> Session:
        """Dial and exchange hellos; `SessionLostError` where nobody answers, another version does, or one without the
        cluster's secret."""
        network = network or WorkerNetwork()
        call = WorkerCall(address, network)
        try:
            async with asyncio.timeout(config.connect_timeout_s):
                hello = await _greet(call, router, network.secret)
            if hello is None:
                raise SessionLostError("the worker did not begin with its hello")
            if hello.wire_version != WIRE_VERSION:
                raise SessionLostError(f"wire version: got {hello.wire_version}, this router speaks {WIRE_VERSION}")
        except TimeoutError as error:
            await call.close()
            raise SessionLostError(f"no hello within {config.connect_timeout_s:g} s") from error
        except BaseException:
            await call.close()
            raise
        return cls(call, hello, config)

    @property
    def num_unsent(self) -> int:
        return len(self._outbox)

    async def close(self) -> None:
        """Whoever opened a session closes it."""
        await self._call.close()

    def send(self, *commands: Command) -> None:
        for command in commands:
            self._outbox.put(command)
        self._pending.set()

    async def run(
        self, deliver: Callable[[WorkerMessage], None], live_transfer_ids: Callable[[], tuple[str, ...]]
    ) -> None:
        """Deliver messages until the stream ends: raises `SessionLostError` or `WireError`, always."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._write())
                tasks.create_task(self._heartbeat(live_transfer_ids))
                await self._read(deliver)
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _read(self, deliver: Callable[[WorkerMessage], None]) -> None:
        dead_after_s = self._config.dead_after_s
        now = asyncio.get_running_loop().time
        try:
            async with asyncio.timeout(dead_after_s) as patience:
                while True:
                    message = await self._call.read()
                    patience.reschedule(now() + dead_after_s)
                    deliver(message)
        except TimeoutError as error:
            raise SessionLostError(f"the worker was silent for {dead_after_s:g} s") from error

    async def _write(self) -> None:
        try:
            while True:
                await self._pending.wait()
                self._pending.clear()
                while self._outbox:
                    await self._call.write(self._outbox.take(MAX_MESSAGE_TOKENS))
        except SessionLostError:
            return  # the reader sees the end of the stream too, and tells why

    async def _heartbeat(self, live_transfer_ids: Callable[[], tuple[str, ...]]) -> None:
        while True:
            self.send(Heartbeat(live_transfer_ids()))
            await asyncio.sleep(self._config.heartbeat_interval_s)


async def _greet(call: WorkerCall, router: RouterHello, secret: Secret | None) -> WorkerHello | None:
    """The worker's hello. Neither side says more than a nonce before the other has proved to have the secret."""
    if secret is None:
        await call.say_hello(router)
        return (await call.read()).hello
    router = replace(router, nonce=draw_nonce())
    await call.say_hello(router)
    if (challenge := (await call.read()).challenge) is None:
        raise SessionLostError("the worker does not prove that it has the cluster's secret")
    handshake = Handshake(secret, router.incarnation, challenge.incarnation, router.nonce, challenge.nonce)
    if not handshake.accepts_worker(challenge.proof):
        raise SessionLostError("the worker has another secret than the cluster's")
    await call.prove(handshake.router_proof(), handshake.session_secret())
    hello = (await call.read()).hello
    if hello is not None and hello.incarnation != challenge.incarnation:
        raise SessionLostError("the worker proved to be another than it says it is")
    return hello
